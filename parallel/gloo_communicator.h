// gloo_communicator.h: the ranks of a run on CPUs, over TCP, by Gloo (Debian, Ubuntu: libgloo-dev).
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "parallel/communicator.h"
#include "parallel/job.h"

// Empty when this program was built with Gloo, otherwise why not and what to do, for a user to read.
std::string gloo_unavailable();

// Connects this rank with every other one; all of them call it, and each is listened to at its `address`, an IP address
// of this machine that the others reach it by. A peer that neither takes nor sends anything for as long as `timeout` is
// lost. It has two threads and a few hundred KiB of its own.
// Throws std::runtime_error in one line.
std::unique_ptr<Communicator> make_gloo_communicator(Job& job, const std::string& address,
                                                     std::chrono::milliseconds timeout);
