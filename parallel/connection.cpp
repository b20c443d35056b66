// connection.cpp: see connection.h.
#include "parallel/connection.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>

namespace {

constexpr int kBacklog = 1024;
constexpr size_t kHeader = 5;

void never_block(int socket) { fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) | O_NONBLOCK); }

using Addresses = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

// Empty, with `problem` saying why, where the name is not known.
Addresses look_up(const std::string& address, int port, std::string& problem) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  const int status = getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (status != 0) problem = gai_strerror(status), found = nullptr;
  return {found, freeaddrinfo};
}

std::string text_of(sockaddr_storage& address, socklen_t size) {
  char text[256];
  if ((address.ss_family != AF_INET && address.ss_family != AF_INET6) ||
      getnameinfo(reinterpret_cast<sockaddr*>(&address), size, text, sizeof text, nullptr, 0, NI_NUMERICHOST) != 0) {
    return "";
  }
  const std::string mapped = "::ffff:";  // IPv4 by a socket of IPv6
  return std::string(text).starts_with(mapped) ? std::string(text).substr(mapped.size()) : text;
}

// An errno, or 0 with `listener` set.
int try_to_listen(const addrinfo& at, Descriptor& listener) {
  Descriptor socket(::socket(at.ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket.is_open()) return errno;
  const int yes = 1, no = 0;
  setsockopt(socket.number(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);  // connections of an earlier run linger
  if (at.ai_family == AF_INET6) setsockopt(socket.number(), IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
  if (bind(socket.number(), at.ai_addr, at.ai_addrlen) != 0 || listen(socket.number(), kBacklog) != 0) return errno;
  listener = std::move(socket);
  return 0;
}

// An errno, or 0 with `connected` set.
int try_to_connect(const addrinfo& to, Clock::time_point deadline, Descriptor& connected) {
  Descriptor socket(::socket(to.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket.is_open()) return errno;
  if (connect(socket.number(), to.ai_addr, to.ai_addrlen) != 0) {
    if (errno != EINPROGRESS) return errno;
    pollfd writable{socket.number(), POLLOUT, 0};
    if (poll(&writable, 1, milliseconds_until(deadline)) != 1) return ETIMEDOUT;
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(socket.number(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) return error;
  }
  // A port in the range of outgoing connections that nobody listens at can be connected with itself.
  sockaddr_storage here{}, there{};
  socklen_t here_size = sizeof here, there_size = sizeof there;
  if (getsockname(socket.number(), reinterpret_cast<sockaddr*>(&here), &here_size) == 0 &&
      getpeername(socket.number(), reinterpret_cast<sockaddr*>(&there), &there_size) == 0 && here_size == there_size &&
      std::memcmp(&here, &there, here_size) == 0) {
    return ECONNREFUSED;
  }
  connected = std::move(socket);
  return 0;
}

}  // namespace

int milliseconds_until(Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 1 << 30));
}

std::string random_nonce() {
  unsigned char bytes[16];
  if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes) throw std::runtime_error("no random numbers");
  std::string text;
  for (const unsigned char byte : bytes) {
    constexpr char kDigits[] = "0123456789abcdef";
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  if (this != &other) {
    reset();
    number_ = other.release();
  }
  return *this;
}

int Descriptor::release() { return std::exchange(number_, -1); }

void Descriptor::reset() {
  if (number_ >= 0) close(release());
}

Descriptor listen_at(const std::string& address, int port) {
  int error = EADDRNOTAVAIL;
  const bool here_only = is_loopback(address);
  for (const char* const name : {here_only ? address.c_str() : "::", here_only ? "127.0.0.1" : "0.0.0.0"}) {
    std::string problem;
    const Addresses found = look_up(name, port, problem);
    for (const addrinfo* at = found.get(); at; at = at->ai_next) {
      Descriptor listener;
      const int status = try_to_listen(*at, listener);
      if (status == 0) return listener;
      if (error != EADDRINUSE) error = status;
    }
    if (error == EADDRINUSE) break;
  }
  const std::string what = "port " + std::to_string(port);
  if (error == EADDRINUSE) throw std::runtime_error(what + " is in use by another program or another run");
  throw std::runtime_error(what + " cannot be listened at: " + std::strerror(error));
}

int port_of(const Descriptor& listener) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  getsockname(listener.number(), reinterpret_cast<sockaddr*>(&address), &size);
  const bool v6 = address.ss_family == AF_INET6;
  return ntohs(v6 ? reinterpret_cast<sockaddr_in6&>(address).sin6_port
                  : reinterpret_cast<sockaddr_in&>(address).sin_port);
}

std::string own_address(const Descriptor& socket) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  return getsockname(socket.number(), reinterpret_cast<sockaddr*>(&address), &size) == 0 ? text_of(address, size) : "";
}

std::string peer_address(const Descriptor& socket) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  return getpeername(socket.number(), reinterpret_cast<sockaddr*>(&address), &size) == 0 ? text_of(address, size) : "";
}

void send_at_once(const Descriptor& socket) {
  const int yes = 1;
  setsockopt(socket.number(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);  // fails on what is not TCP
}

bool is_loopback(const std::string& address) {
  return address == "localhost" || address == "::1" || address.starts_with("127.");
}

Descriptor connect_to(const std::string& address, int port, Clock::time_point deadline) {
  std::string problem = "nobody answers";
  auto pause = std::chrono::milliseconds(20);
  do {
    const Addresses found = look_up(address, port, problem);
    for (const addrinfo* to = found.get(); to; to = to->ai_next) {
      Descriptor connected;
      const int status = try_to_connect(*to, deadline, connected);
      if (status == 0) return connected;
      problem = std::strerror(status);
    }
    std::this_thread::sleep_for(
        std::min<Clock::duration>(pause, std::max(deadline - Clock::now(), Clock::duration(0))));
    pause = std::min(2 * pause, std::chrono::milliseconds(500));
  } while (Clock::now() < deadline);
  throw std::runtime_error(problem);
}

Descriptor accept_from(const Descriptor& listener, const std::string& token, Clock::time_point deadline) {
  struct Caller {
    Descriptor socket;
    std::string said;
  };
  std::vector<Caller> callers;
  never_block(listener.number());  // who has gone again is not waited for
  for (;;) {
    std::vector<pollfd> sockets = {{listener.number(), POLLIN, 0}};
    for (const Caller& caller : callers) sockets.push_back({caller.socket.number(), POLLIN, 0});
    const int ready = poll(sockets.data(), sockets.size(), milliseconds_until(deadline));
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) throw std::runtime_error(std::strerror(ready == 0 ? ETIMEDOUT : errno));
    for (size_t i = callers.size(); i-- > 0;) {
      if (sockets[i + 1].revents == 0) continue;
      Caller& caller = callers[i];
      char bytes[64];
      const size_t most = std::min(sizeof bytes, token.size() - caller.said.size());
      const ssize_t count = recv(caller.socket.number(), bytes, most, 0);
      if (count > 0) caller.said.append(bytes, static_cast<size_t>(count));
      if (caller.said == token) return std::move(caller.socket);
      const bool again = count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR);
      if (!again && (count <= 0 || !token.starts_with(caller.said)))
        callers.erase(callers.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (sockets[0].revents == 0) continue;
    Descriptor socket(accept4(listener.number(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (socket.is_open()) callers.push_back({std::move(socket), ""});
  }
}

MessageWriter& MessageWriter::number(uint32_t value) {
  for (int shift = 0; shift < 32; shift += 8) bytes_ += static_cast<char>(value >> shift & 0xff);
  return *this;
}

MessageWriter& MessageWriter::text(std::string_view value) {
  number(static_cast<uint32_t>(value.size()));
  bytes_ += value;
  return *this;
}

std::string_view MessageReader::take(size_t bytes) {
  if (bytes > rest_.size()) throw std::runtime_error("a message is shorter than it says");
  const std::string_view taken = rest_.substr(0, bytes);
  rest_.remove_prefix(bytes);
  return taken;
}

uint32_t MessageReader::number() {
  uint32_t value = 0;
  const std::string_view bytes = take(4);
  for (int i = 0; i < 4; ++i) value |= static_cast<uint32_t>(static_cast<uint8_t>(bytes[i])) << 8 * i;
  return value;
}

std::string MessageReader::text() { return std::string(take(number())); }

void MessageReader::end() const {
  if (!rest_.empty()) throw std::runtime_error("a message is longer than it says");
}

Connection::Connection(Descriptor socket, size_t longest) : socket_(std::move(socket)), longest_(longest) {
  never_block(socket_.number());
  send_at_once(socket_);
}

void Connection::push(uint8_t kind, std::string_view body) {
  output_ += MessageWriter().number(static_cast<uint32_t>(body.size() + 1)).take();
  output_ += static_cast<char>(kind);
  output_ += body;
}

bool Connection::flush() {
  size_t sent = 0;
  bool alive = true;
  while (sent < output_.size()) {
    const ssize_t bytes = send(socket_.number(), output_.data() + sent, output_.size() - sent, MSG_NOSIGNAL);
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes < 0) {
      alive = errno == EAGAIN || errno == EWOULDBLOCK;
      break;
    }
    sent += static_cast<size_t>(bytes);
  }
  output_.erase(0, sent);
  return alive;
}

bool Connection::fill() {
  char bytes[65536];
  // A message at a time, so that one side cannot fill the other's memory.
  while (input_.size() <= longest_ + kHeader) {
    const ssize_t count = recv(socket_.number(), bytes, sizeof bytes, 0);
    if (count > 0) {
      input_.append(bytes, static_cast<size_t>(count));
    } else if (count == 0 || errno != EINTR) {
      return count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    }
  }
  return true;
}

std::optional<Message> Connection::next() {
  if (input_.size() < 4) return std::nullopt;
  const size_t length = MessageReader(input_).number();
  if (length == 0 || length > longest_ + 1)
    throw std::runtime_error("a message of " + std::to_string(length) + " bytes");
  if (input_.size() < 4 + length) return std::nullopt;
  Message message{static_cast<uint8_t>(input_[4]), input_.substr(kHeader, length - 1)};
  input_.erase(0, 4 + length);
  return message;
}

void Connection::end_output() { shutdown(socket_.number(), SHUT_WR); }
