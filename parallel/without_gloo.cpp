// without_gloo.cpp: what a build without Gloo says about several ranks on CPUs.
#include <stdexcept>

#include "parallel/gloo_communicator.h"

std::string gloo_unavailable() {
  return "this program was built without Gloo (" WITHOUT_GLOO
         "), which several ranks on CPUs need: install libgloo-dev and build it again";
}

std::unique_ptr<Communicator> make_gloo_communicator(Job&, const std::string&, std::chrono::milliseconds) {
  throw std::runtime_error(gloo_unavailable());
}
