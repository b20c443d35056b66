// protocol.h: what the processes of a job say to rank 0's server and it to them. A connection begins with kHello; after
// kWelcome it is a member's. docs/design.md, section 11.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>

inline constexpr char kProtocol[] = "train_gpt2 job, version 1";
inline constexpr size_t kLongestHello = 4096, kLongestMessage = size_t{64} << 20;

enum MessageKind : uint8_t {
  // from a member
  kHello,      // protocol, nonce, rank, size, host, pid
  kGather,     // text: this member's next one
  kSet,        // key, value
  kGet,        // key
  kFail,       // text: why this process ends
  kLeave,      // nothing: this process is done
  kAlive,      // nothing; in both directions
               // from the server
  kRefused,    // text: why
  kWelcome,    // nothing
  kStart,      // host, pid and IP address of each rank: all are there
  kGathered,   // texts of all
  kValue,      // key, value
  kLost,       // rank (kNobody: of no one), text: the job ends, and why
  kFailHeard,  // 1: another rank said the same; the answer to kFail
  kAllLeft,    // nothing: everybody has said kLeave
};
inline constexpr uint32_t kNobody = UINT32_MAX;

// Rank and place as messages name them: "rank 1 (host node2, process 4711)".
inline std::string member_name(uint32_t rank, const std::string& host, uint32_t pid) {
  return "rank " + std::to_string(rank) + " (host " + host + ", process " + std::to_string(pid) + ")";
}

// "60 s"
inline std::string seconds_text(double seconds) {
  char text[32];
  snprintf(text, sizeof text, "%g s", seconds);
  return text;
}
