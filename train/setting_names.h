// setting_names.h: settings as they are written in flags.
#pragma once

#include <string>

#include "train/engine.h"

std::string recompute_name(Recompute level);
Recompute recompute_of(const std::string& name);

std::string gradient_blocks_name(GradientBlocks blocks);
GradientBlocks gradient_blocks_of(const std::string& name);

std::string transfer_name(TransferKind transfer);
TransferKind transfer_of(const std::string& name);

// "none", or a list such as "activations,weights"; weights bring their state along.
std::string offload_name(const Offload& offload);
Offload offload_of(const std::string& list, int64_t layers_in_flight);
