// test_safetensors.cpp: files are read as they were written, laid out as the format says, and every kind of damage is
// one line that names the file.
#include "train/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/temporary_directory.h"

namespace {

#define EXPECT_HAS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

std::string file_of(const std::string& header, const std::string& data, uint64_t declared = 0) {
  const uint64_t length = declared == 0 ? header.size() : declared;
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + data;
}

TEST(Safetensors, RoundTrip) {
  TemporaryDirectory directory;
  const std::string path = directory / "a.safetensors";
  const std::vector<float> matrix = {1, -2, 3.5f, std::numeric_limits<float>::infinity(), 1e-40f, 0};
  const std::vector<int8_t> codes = {-127, 0, 127};
  SafetensorsWriter writer(path, {{"h.0.weight", "F32", {2, 3}, nullptr},
                                  {"codes", "I8", {3}, nullptr},
                                  {"empty", "F32", {0, 4}, nullptr},
                                  {"scalar", "F32", {}, nullptr}});
  writer.write(matrix.data(), 24);
  writer.write(codes.data(), 3);
  writer.write(matrix.data() + 2, 4);
  const FileSummary written = writer.finish();
  const FileSummary found = summarize_file(path);
  EXPECT_EQ(written.bytes, found.bytes);
  EXPECT_EQ(written.crc32, found.crc32);
  EXPECT_EQ(written.bytes, std::filesystem::file_size(path));

  const SafetensorsReader reader(path);
  ASSERT_EQ(reader.entries().size(), 4u);
  const TensorEntry* entry = reader.find("h.0.weight");
  ASSERT_NE(entry, nullptr);
  EXPECT_EQ(entry->dtype, "F32");
  EXPECT_EQ(entry->shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(std::memcmp(entry->data, matrix.data(), 24), 0);
  EXPECT_EQ(std::memcmp(reader.find("codes")->data, codes.data(), 3), 0);
  EXPECT_EQ(reader.find("empty")->elements(), 0);
  EXPECT_EQ(reader.find("scalar")->elements(), 1);
  EXPECT_EQ(reader.find("absent"), nullptr);

  // The layout of the format: the header's length, the header, padding to a multiple of 8, the data.
  const std::string bytes = read_file(path);
  uint64_t length;
  std::memcpy(&length, bytes.data(), 8);
  EXPECT_EQ(length % 8, 0u);
  const auto header = nlohmann::json::parse(bytes.substr(8, length));
  EXPECT_EQ(header["__metadata__"]["format"], "pt");
  EXPECT_EQ(header["codes"]["data_offsets"], (std::vector<int>{24, 27}));
  EXPECT_EQ(bytes.size(), 8 + length + 24 + 3 + 4);
}

TEST(Safetensors, RefusesDamagedFiles) {
  TemporaryDirectory directory;
  const std::string good_header = R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})";
  EXPECT_NO_THROW(SafetensorsReader(directory.write("good", file_of(good_header, "12345678"))));

  const auto error_of = [&](const std::string& bytes) {
    const std::string path = directory.write("bad", bytes);
    const std::string message = message_of([&] { SafetensorsReader reader(path); });
    EXPECT_NE(message, "") << "accepted";
    EXPECT_EQ(message.rfind(path + ": ", 0), 0u) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    return message;
  };
  const std::string good = file_of(good_header, "12345678");
  for (const size_t size : {size_t{0}, size_t{7}, size_t{8}, size_t{40}, good.size() - 1}) {
    error_of(good.substr(0, size));
  }
  EXPECT_HAS(error_of(good.substr(0, good.size() - 1)), "truncated");
  error_of(file_of(good_header, "12345678", uint64_t{1} << 62));
  error_of(file_of(good_header, "12345678", ~uint64_t{0} - 1));
  error_of(file_of("[]", ""));
  error_of(file_of("7", ""));
  error_of(file_of("{\"a\": ", "12345678"));
  error_of(file_of(R"({"a": 5})", "12345678"));
  for (const char* entry : {
           R"({"dtype": "F32", "shape": [2], "data_offsets": [0, 9]})",                          // beyond the file
           R"({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]})",                          // backwards
           R"({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]})",                          // another size
           R"({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]})",                         // negative
           R"({"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]})",                     // negative twice
           R"({"dtype": "F32", "shape": [4611686018427387904, 2, 2], "data_offsets": [0, 0]})",  // overflows to 0
           R"({"dtype": "F99", "shape": [2], "data_offsets": [0, 8]})",                          // unknown
           R"({"dtype": "F99", "shape": [2], "data_offsets": [0, 0]})",                          // unknown and empty
           R"({"dtype": 4, "shape": [2], "data_offsets": [0, 8]})",                              //
           R"({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]})",                            //
           R"({"dtype": "F32", "shape": [2], "data_offsets": [0]})",                             //
           R"({"dtype": "F32", "shape": [2]})",
           R"({"dtype": "F32", "shape": [2.7], "data_offsets": [0, 8]})",      // a fraction
           R"({"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]})",  // no number
           R"({"dtype": "F32", "shape": {"a": 2}, "data_offsets": [0, 8]})",   // no list
           R"({"dtype": "F32", "shape": [2], "data_offsets": [0, 8.2]})",      //
           R"({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]})",       //
           R"({"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]})",     //
           R"({"dtype": "F32", "shape": [1e400], "data_offsets": [0, 8]})",    //
           R"({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})",        // bytes of no tensor at the end
           R"({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]})",        // and at the beginning
           R"({"dtype": "F32", "shape": [2, 9223372036854775808], "data_offsets": [0, 8]})",
       }) {
    error_of(file_of("{\"a\": " + std::string(entry) + "}", "12345678"));
  }
  const auto tensor = [](const char* name, int count, int begin, int end) {
    return '"' + std::string(name) + R"(": {"dtype": "F32", "shape": [)" + std::to_string(count) +
           R"(], "data_offsets": [)" + std::to_string(begin) + ", " + std::to_string(end) + "]}";
  };
  const auto header_of = [](const std::string& a, const std::string& b) { return "{" + a + ", " + b + "}"; };
  EXPECT_NO_THROW(SafetensorsReader(
      directory.write("good", file_of(header_of(tensor("a", 1, 4, 8), tensor("b", 1, 0, 4)), "12345678"))));
  EXPECT_HAS(error_of(file_of(header_of(tensor("a", 2, 0, 8), tensor("b", 1, 4, 8)), "12345678")), "share");
  EXPECT_HAS(error_of(file_of(header_of(tensor("a", 2, 0, 8), tensor("b", 2, 0, 8)), "12345678")), "share");
  EXPECT_HAS(error_of(file_of(header_of(tensor("a", 1, 0, 4), tensor("b", 1, 8, 12)), "123456789012")), "no tensor");
  EXPECT_HAS(error_of(file_of(header_of(tensor("a", 1, 0, 4), tensor("a", 1, 4, 8)), "12345678")), "twice");
  EXPECT_HAS(error_of(file_of("{\"a\": " + std::string(80000, '['), "")), "nests deeper");
  EXPECT_HAS(message_of([] { SafetensorsReader reader("/dev/zero"); }), "is a device");
  const std::string absent = message_of([&] { SafetensorsReader reader(directory / "absent"); });
  EXPECT_HAS(absent, "absent");
  EXPECT_HAS(absent, "No such file");
  EXPECT_NE(message_of([&] { SafetensorsReader reader(directory.path()); }), "");
}

TEST(Safetensors, AWriterSaysThatItCannotWrite) {
  TemporaryDirectory directory;
  EXPECT_HAS(message_of([&] { SafetensorsWriter writer(directory / "absent/a", {}); }), "No such file");
  const std::string full = message_of([&] {
    SafetensorsWriter writer("/dev/full", {{"a", "F32", {2}, nullptr}});
    writer.write("12345678", 8);
    writer.finish();
  });
  EXPECT_HAS(full, "/dev/full: cannot be written: No space left on device");
}

}  // namespace
