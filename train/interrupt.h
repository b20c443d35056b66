// interrupt.h: SIGINT and SIGTERM as a flag that the training loop looks at between steps. A second signal ends the
// program.
#pragma once

void watch_for_interrupts();
bool interrupted();
