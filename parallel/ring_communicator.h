// ring_communicator.h: the ranks of a run on CPUs, in a ring of TCP connections.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "parallel/communicator.h"
#include "parallel/job.h"

// Connects this rank with the one before and the one after it; all of them call it, and each is listened to at its
// `address`, a name or an IP address of this machine that the others reach it by. A peer that neither takes nor sends
// anything for as long as `timeout` is lost. It has one thread and 128 KiB of its own.
// Throws std::runtime_error in one line.
std::unique_ptr<Communicator> make_ring_communicator(Job& job, const std::string& address,
                                                     std::chrono::milliseconds timeout);
