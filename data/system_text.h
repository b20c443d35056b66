// system_text.h: data for a first run with no network and no Python: the text that lies on the machine anyway
// (licences, package notes, C and C++ headers, Python and Perl sources), as byte-tokenized shards. Reads at most a few
// times max_bytes; about a second for the default.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// Where to look, and for which files.
struct SystemTextSource {
  std::string roots;                    // a glob of directories
  std::vector<std::string> extensions;  // ".h"; empty: every file
  std::string file_name;                // only files of this name; empty: any
};

struct SystemTextOptions {
  std::vector<SystemTextSource> sources;    // empty: default_text_sources()
  int64_t max_bytes = 16 * 1024 * 1024;     // of text, all sources together, shared evenly as far as they reach
  int64_t min_bytes = 100 * 1024;           // less than this is an error
  int64_t max_document_bytes = 256 * 1024;  // longer files are left out
  double validation_fraction = 0.05;        // of the bytes, whole documents chosen by the hash of their content
};

struct SystemTextPaths {
  std::string train, validation;  // the two shards
  bool created = false;           // false: they were there already and are used as they are
};

std::vector<SystemTextSource> default_text_sources();

// Writes DIR/system_text_train_000000.bin and DIR/system_text_val_000000.bin (llm.c format, header[3] = 257: 256 bytes
// and end-of-text = 256, which begins every document), making the directory if need be. If both are there and valid,
// does nothing. Files are visited in the order of a hash of their path, so the same files give the same shards;
// binaries (a NUL byte, or not UTF-8), symbolic links and near-duplicates (most of their lines seen before) are left
// out. Throws std::runtime_error in one line when too little text is found or the shards cannot be written.
SystemTextPaths make_system_text(const std::string& directory, const SystemTextOptions& options = {});
