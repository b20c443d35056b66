// safetensors.h: Hugging Face's tensor files: 8 bytes header length, a JSON header, then the tensors' bytes one after
// another. Format: https://github.com/huggingface/safetensors. A reader maps the file; a writer streams it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "train/file_io.h"

struct TensorEntry {
  std::string name;
  std::string dtype;  // "F32", "F16", "BF16", "I8", "U8", "I32"
  std::vector<int64_t> shape;
  const void* data = nullptr;  // in the mapping; only set by the reader

  int64_t elements() const;
  size_t bytes() const;
};

// Throws std::runtime_error naming the file for one that is missing, truncated or not safetensors.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::string& path);
  ~SafetensorsReader();
  SafetensorsReader(const SafetensorsReader&) = delete;
  SafetensorsReader& operator=(const SafetensorsReader&) = delete;

  const TensorEntry* find(const std::string& name) const;  // null when there is none
  const std::map<std::string, TensorEntry>& entries() const { return entries_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  void* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
  std::map<std::string, TensorEntry> entries_;
};

// The tensors are declared first, then their bytes are written in the order of the declaration.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::string& path, const std::vector<TensorEntry>& entries);
  // From the device's memory, through a small buffer in the host's. Throws std::runtime_error naming the tensor when a
  // number is not finite.
  void write(const Tensor& tensor, Backend& backend);
  void write(const void* data, size_t bytes) { file_.write(data, bytes); }
  FileSummary finish() { return file_.finish(); }

 private:
  FileWriter file_;
  std::vector<std::string> names_;  // in the order of writing
  size_t written_ = 0;              // tensors
  std::vector<char> buffer_;
};
