// test_standard_streams.cpp: what is said on standard error.
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "train/standard_streams.h"

namespace {

// What `speak` writes to standard error, call by call of write().
std::vector<std::string> pieces_of(const std::function<void()>& speak) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_DGRAM, 0, ends) != 0) throw std::runtime_error("no pair of sockets");
  const int before = dup(STDERR_FILENO);
  dup2(ends[0], STDERR_FILENO);
  speak();
  dup2(before, STDERR_FILENO);
  std::vector<std::string> pieces;
  char piece[4096];
  for (ssize_t size; (size = recv(ends[1], piece, sizeof piece, MSG_DONTWAIT)) > 0;)
    pieces.emplace_back(piece, static_cast<size_t>(size));
  for (const int descriptor : {ends[0], ends[1], before}) close(descriptor);
  return pieces;
}

// Lines of several ranks mixed where one was written in pieces.
TEST(StandardStreams, AMessageIsWrittenAtOnce) {
  const std::string message(500, 'x');
  EXPECT_EQ(pieces_of([&] { say_on_error(message); }), std::vector<std::string>({"train_gpt2: " + message + "\n"}));
}

TEST(StandardStreams, AMessageIsOneLineOfSomeHundredBytes) {
  EXPECT_EQ(pieces_of([] { say_on_error("a\nb\tc"); }), std::vector<std::string>({"train_gpt2: a b c\n"}));
  const std::vector<std::string> pieces = pieces_of([] { say_on_error(std::string(5000, 'x') + "end"); });
  ASSERT_EQ(pieces.size(), 1u);
  EXPECT_LT(pieces[0].size(), 600u);
  EXPECT_TRUE(pieces[0].ends_with("xend\n"));
}

}  // namespace
