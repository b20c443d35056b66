// version.h: the version that --version, metrics.jsonl and checkpoints name.
#pragma once

inline constexpr char kVersion[] = "train_gpt2 0.1.0";
