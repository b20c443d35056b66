// setting_names.cpp: see setting_names.h.
#include "train/setting_names.h"

#include <stdexcept>
#include <utility>

namespace {

constexpr std::pair<const char*, Recompute> kLevels[] = {{"none", Recompute::kNone},
                                                         {"gelu", Recompute::kGelu},
                                                         {"norms+gelu", Recompute::kNormsGelu},
                                                         {"attention", Recompute::kAttention},
                                                         {"block", Recompute::kBlock}};
constexpr std::pair<const char*, GradientBlocks> kBlocks[] = {
    {"whole", GradientBlocks::kWhole}, {"embedding", GradientBlocks::kEmbedding}, {"all", GradientBlocks::kAll}};
constexpr std::pair<const char*, TransferKind> kTransfers[] = {
    {"reencode", TransferKind::kReencode}, {"restart", TransferKind::kRestart}, {"rescale", TransferKind::kRescale}};

template <typename Table, typename Value>
std::string name_in(const Table& table, Value value) {
  for (const auto& [name, entry] : table) {
    if (entry == value) return name;
  }
  throw std::logic_error("a setting without a name");
}

template <typename Table>
auto value_in(const Table& table, const std::string& name) {
  for (const auto& [entry, value] : table) {
    if (entry == name) return value;
  }
  throw std::logic_error("no setting " + name);
}

}  // namespace

std::string recompute_name(Recompute level) { return name_in(kLevels, level); }
Recompute recompute_of(const std::string& name) { return value_in(kLevels, name); }

std::string gradient_blocks_name(GradientBlocks blocks) { return name_in(kBlocks, blocks); }
GradientBlocks gradient_blocks_of(const std::string& name) { return value_in(kBlocks, name); }

std::string transfer_name(TransferKind transfer) { return name_in(kTransfers, transfer); }
TransferKind transfer_of(const std::string& name) { return value_in(kTransfers, name); }

std::string offload_name(const Offload& offload) {
  std::string list;
  const auto add = [&](bool offloaded, const char* what) {
    if (offloaded) list += (list.empty() ? "" : ",") + std::string(what);
  };
  add(offload.activations, "activations");
  add(offload.state && !offload.weights, "state");
  add(offload.weights, "weights");
  return list.empty() ? "none" : list;
}

Offload offload_of(const std::string& list, int64_t layers_in_flight) {
  const auto has = [&](const char* what) { return ("," + list + ",").find(what) != std::string::npos; };
  return {.activations = has(",activations,"),
          .state = has(",state,") || has(",weights,"),
          .weights = has(",weights,"),
          .layers_in_flight = static_cast<int>(layers_in_flight)};
}
