// safetensors.cpp: see safetensors.h.
#include "train/safetensors.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

#include "data/input_file.h"
#include "data/json_text.h"

namespace {

// Whether none of the floats is infinite or NaN, which have an exponent of ones.
template <typename Bits>
bool all_finite(const std::vector<char>& bytes, Bits exponent) {
  bool finite = true;
  for (size_t i = 0; i < bytes.size(); i += sizeof(Bits)) {
    Bits bits;
    std::memcpy(&bits, bytes.data() + i, sizeof bits);
    finite &= (bits & exponent) != exponent;
  }
  return finite;
}

bool all_finite(const std::vector<char>& bytes, DType dtype) {
  if (dtype == DType::kF32) return all_finite<uint32_t>(bytes, 0x7f800000u);
  if (dtype == DType::kBF16) return all_finite<uint16_t>(bytes, 0x7f80u);
  return true;
}

size_t element_size(const std::string& dtype) {
  static const std::map<std::string, size_t> sizes = {{"F64", 8},  {"I64", 8}, {"F32", 4}, {"I32", 4}, {"F16", 2},
                                                      {"BF16", 2}, {"I16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}};
  const auto entry = sizes.find(dtype);
  return entry == sizes.end() ? 0 : entry->second;
}

constexpr uint64_t kLargestHeader = 100'000'000;  // as in Hugging Face's reader

// Throws std::invalid_argument or the JSON library's exceptions.
TensorEntry entry_of(const std::string& name, const nlohmann::json& value) {
  TensorEntry entry{name, value.at("dtype"), {}, nullptr};
  if (element_size(entry.dtype) == 0) throw std::invalid_argument("has the unknown type " + entry.dtype);
  const auto natural = [](const nlohmann::json& number) { return number.is_number_unsigned(); };
  const nlohmann::json& shape = value.at("shape");
  if (!shape.is_array() || !std::all_of(shape.begin(), shape.end(), natural)) {
    throw std::invalid_argument("has a shape that is no list of whole numbers");
  }
  uint64_t room = uint64_t{1} << 60;  // what is left of the largest number of elements
  for (const nlohmann::json& number : shape) {
    const uint64_t extent = number;
    if (extent > room) throw std::invalid_argument("has an impossible shape");
    if (extent > 0) room /= extent;
    entry.shape.push_back(static_cast<int64_t>(extent));
  }
  const nlohmann::json& offsets = value.at("data_offsets");
  if (!offsets.is_array() || offsets.size() != 2 || !natural(offsets[0]) || !natural(offsets[1])) {
    throw std::invalid_argument("has data_offsets that are not two whole numbers");
  }
  return entry;
}

}  // namespace

int64_t TensorEntry::elements() const {
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  return count;
}

size_t TensorEntry::bytes() const { return static_cast<size_t>(elements()) * element_size(dtype); }

SafetensorsReader::SafetensorsReader(const std::string& path) : path_(path) {
  const InputFile file(path);
  mapped_bytes_ = file.bytes();
  const auto damaged = [&](const std::string& why) -> std::runtime_error {
    return std::runtime_error(path + ": not a whole safetensors file (" + why + ")");
  };
  if (mapped_bytes_ < 8) throw damaged("only " + std::to_string(mapped_bytes_) + " bytes");
  mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw std::runtime_error(path + ": cannot be mapped: " + std::strerror(errno));
  }
  try {
    const char* bytes = static_cast<const char*>(mapping_);
    uint64_t header_bytes;
    std::memcpy(&header_bytes, bytes, 8);
    if (header_bytes > mapped_bytes_ - 8) throw damaged("the header ends beyond the file");
    if (header_bytes > kLargestHeader) throw damaged("the header has " + std::to_string(header_bytes) + " bytes");
    const nlohmann::json header = parse_json({bytes + 8, header_bytes}, path + ": header");
    if (!header.is_object()) throw damaged("the header is no JSON object");
    const size_t data_bytes = mapped_bytes_ - 8 - header_bytes;
    std::vector<std::pair<uint64_t, uint64_t>> ranges;  // begin and end of each tensor
    for (const auto& [name, value] : header.items()) {
      if (name == "__metadata__") continue;
      TensorEntry entry;
      try {
        entry = entry_of(name, value);
        ranges.emplace_back(value.at("data_offsets").at(0), value.at("data_offsets").at(1));
      } catch (const nlohmann::json::exception& error) {
        throw damaged("tensor '" + name + "': " + problem_of(error));
      } catch (const std::invalid_argument& error) {
        throw damaged("tensor '" + name + "' " + error.what());
      }
      const auto [begin, end] = ranges.back();
      if (begin > end || end > data_bytes) throw damaged("tensor '" + name + "' ends beyond the file: truncated");
      if (end - begin != entry.bytes()) throw damaged("tensor '" + name + "' has a size that does not fit its shape");
      entry.data = bytes + 8 + header_bytes + begin;
      entries_[name] = entry;
    }
    // The format wants every byte to be of exactly one tensor.
    std::sort(ranges.begin(), ranges.end());
    uint64_t covered = 0;
    for (const auto& [begin, end] : ranges) {
      if (begin < covered) throw damaged("two tensors share the byte " + std::to_string(begin) + " of the data");
      if (begin > covered) throw damaged("the byte " + std::to_string(covered) + " of the data is of no tensor");
      covered = end;
    }
    if (covered != data_bytes) {
      throw damaged("the tensors end at the byte " + std::to_string(covered) + " of the data's " +
                    std::to_string(data_bytes));
    }
  } catch (...) {
    munmap(mapping_, mapped_bytes_);
    throw;
  }
}

SafetensorsReader::~SafetensorsReader() {
  if (mapping_) munmap(mapping_, mapped_bytes_);
}

const TensorEntry* SafetensorsReader::find(const std::string& name) const {
  const auto entry = entries_.find(name);
  return entry == entries_.end() ? nullptr : &entry->second;
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, const std::vector<TensorEntry>& entries) : file_(path) {
  nlohmann::ordered_json header = {{"__metadata__", {{"format", "pt"}}}};
  size_t offset = 0;
  for (const TensorEntry& entry : entries) {
    header[entry.name] = {
        {"dtype", entry.dtype}, {"shape", entry.shape}, {"data_offsets", {offset, offset + entry.bytes()}}};
    offset += entry.bytes();
    names_.push_back(entry.name);
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data starts at a multiple of 8
  const uint64_t header_bytes = text.size();
  file_.write(&header_bytes, 8);
  file_.write(text.data(), text.size());
}

void SafetensorsWriter::write(const Tensor& tensor, Backend& backend) {
  constexpr size_t kPiece = size_t{8} << 20;
  for (size_t begin = 0; begin < tensor.bytes(); begin += kPiece) {
    buffer_.resize(std::min(kPiece, tensor.bytes() - begin));
    backend.copy(buffer_.data(), static_cast<const char*>(tensor.data) + begin, buffer_.size());
    backend.synchronize();
    if (!all_finite(buffer_, tensor.dtype)) throw std::runtime_error(names_.at(written_) + " is not finite");
    file_.write(buffer_.data(), buffer_.size());
  }
  ++written_;
}
