// safetensors.cpp: see safetensors.h.
#include "train/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <stdexcept>

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

}  // namespace

int64_t TensorEntry::elements() const {
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  return count;
}

size_t TensorEntry::bytes() const { return static_cast<size_t>(elements()) * element_size(dtype); }

SafetensorsReader::SafetensorsReader(const std::string& path) : path_(path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw std::runtime_error(path + ": cannot be read: " + std::strerror(errno));
  struct stat status {};
  fstat(descriptor, &status);
  mapped_bytes_ = static_cast<size_t>(status.st_size);
  const auto damaged = [&](const std::string& why) -> std::runtime_error {
    return std::runtime_error(path + ": not a whole safetensors file (" + why + ")");
  };
  if (mapped_bytes_ < 8) {
    close(descriptor);
    throw damaged("only " + std::to_string(mapped_bytes_) + " bytes");
  }
  mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ, MAP_PRIVATE, descriptor, 0);
  close(descriptor);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw std::runtime_error(path + ": cannot be mapped: " + std::strerror(errno));
  }
  try {
    const char* bytes = static_cast<const char*>(mapping_);
    uint64_t header_bytes;
    std::memcpy(&header_bytes, bytes, 8);
    if (header_bytes > mapped_bytes_ - 8) throw damaged("the header ends beyond the file");
    nlohmann::json header;
    try {
      header = nlohmann::json::parse(bytes + 8, bytes + 8 + header_bytes);
      if (!header.is_object()) throw damaged("the header is no JSON object");
      const size_t data_bytes = mapped_bytes_ - 8 - header_bytes;
      for (const auto& [name, value] : header.items()) {
        if (name == "__metadata__") continue;
        TensorEntry entry{name, value.at("dtype"), value.at("shape").get<std::vector<int64_t>>(), nullptr};
        if (element_size(entry.dtype) == 0) throw damaged("tensor '" + name + "' has the unknown type " + entry.dtype);
        int64_t room = int64_t{1} << 60;  // what is left of the largest number of elements
        for (const int64_t extent : entry.shape) {
          if (extent < 0 || extent > room) throw damaged("tensor '" + name + "' has an impossible shape");
          if (extent > 0) room /= extent;
        }
        const uint64_t begin = value.at("data_offsets").at(0), end = value.at("data_offsets").at(1);
        if (begin > end || end > data_bytes) throw damaged("tensor '" + name + "' ends beyond the file: truncated");
        if (end - begin != entry.bytes()) throw damaged("tensor '" + name + "' has a size that does not fit its shape");
        entry.data = bytes + 8 + header_bytes + begin;
        entries_[name] = entry;
      }
    } catch (const nlohmann::json::exception& error) {
      throw damaged(std::string("header: ") + error.what());
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
