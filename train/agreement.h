// agreement.h: what the processes of a job compare before they read or write anything, and how rank 0's choices reach
// the others.
#pragma once

#include <string>

#include "parallel/job.h"
#include "train/options.h"
#include "train/run_setup.h"

// The build id that the linker has given this program, in hexadecimal; "" where it has given none.
std::string build_id();

// The same program and the same options, but for those that concern one machine. Throws LaunchError on every rank where
// one differs.
void agree_on_options(Job& job, const Options& options);

// Rank 0's text, on every rank; the others' is not used.
std::string from_rank_0(Job& job, const std::string& text);

// The GPU of a rank, and with how many ranks it shares its cores: a launcher may have given each its own.
DevicePlace device_place(Job& job);

// The same kind of device on every rank, and no GPU twice (unless NCCL_MULTI_RANK_GPU_ENABLE is set). Throws
// LaunchError.
void agree_on_device(Job& job, const Backend& backend, const DevicePlace& place);

// Throws UsageError where --devices asks for more GPUs than there are.
void check_devices(const Options& options);
