// nvidia_libraries.cpp: finds NVIDIA's shared libraries with dlopen.
#include "kernels/nvidia_libraries.h"

#include <dlfcn.h>
#include <glob.h>

#include <cstdlib>

namespace {

// What the environment variable says and `rest`; empty when it is not set.
std::string below(const char* variable, const std::string& rest) {
  const char* const value = std::getenv(variable);
  return value && *value ? value + rest : "";
}

// The library folders of pip's packages in the Python that is installed at `root`.
void add_folders_of_pip(std::vector<std::string>& folders, const std::string& root) {
  if (root.empty()) return;
  glob_t found = {};
  for (const char* packages : {"site-packages", "dist-packages"}) {
    const std::string pattern = root + "/lib/python3*/" + packages + "/nvidia/*/lib/";
    if (glob(pattern.c_str(), 0, nullptr, &found) == 0)
      folders.insert(folders.end(), found.gl_pathv, found.gl_pathv + found.gl_pathc);
    globfree(&found);
  }
}

}  // namespace

std::vector<std::string> nvidia_library_folders() {
  std::vector<std::string> folders;
  for (const std::string& folder :
       {below("CUDA_HOME", "/lib64/"), below("CUDA_PATH", "/lib64/"), below("CONDA_PREFIX", "/lib/")}) {
    if (!folder.empty()) folders.push_back(folder);
  }
  for (const std::string& root : {below("VIRTUAL_ENV", ""), below("CONDA_PREFIX", ""), below("HOME", "/.local"),
                                  std::string("/usr/local"), std::string("/usr")})
    add_folders_of_pip(folders, root);
  folders.insert(folders.end(), {"/usr/local/cuda/lib64/", "/opt/cuda/lib64/"});
  return folders;
}

void* open_nvidia_library(const std::vector<std::string>& names, std::string& reason) {
  std::vector<std::string> folders = nvidia_library_folders();
  folders.insert(folders.begin(), "");
  reason.clear();
  for (const std::string& name : names) {
    for (const std::string& folder : folders) {
      if (void* const library = dlopen((folder + name).c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
      if (reason.empty()) reason = dlerror();
    }
  }
  return nullptr;
}
