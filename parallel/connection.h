// connection.h: TCP between the processes of a job: sockets, and messages over them. What arrives may come from
// anybody: every length is bounded before it is believed.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

using Clock = std::chrono::steady_clock;

// From now, as poll() takes it.
int milliseconds_until(Clock::time_point deadline);

// 16 random bytes in hexadecimal digits: what a stranger does not know.
std::string random_nonce();

// A file descriptor that is closed with its owner.
class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  ~Descriptor() { reset(); }
  Descriptor(Descriptor&& other) noexcept : number_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept;

  int number() const { return number_; }
  bool is_open() const { return number_ >= 0; }
  int release();
  void reset();

 private:
  int number_;
};

// A socket that listens: on the loopback interface where `address` means it, else on all of them (IPv6 and IPv4).
// Port 0: any that is free. Throws std::runtime_error naming the port.
Descriptor listen_at(const std::string& address, int port);
int port_of(const Descriptor& listener);

// The IP addresses of a connection's ends, as getaddrinfo takes them; "" for what is not TCP.
std::string own_address(const Descriptor& socket);
std::string peer_address(const Descriptor& socket);
bool is_loopback(const std::string& address);

// Short messages are not held back to be sent with the next ones.
void send_at_once(const Descriptor& socket);

// A connection to address:port, tried again until somebody listens there. Throws std::runtime_error when nobody does
// before the deadline, with the system's last word on it.
Descriptor connect_to(const std::string& address, int port, Clock::time_point deadline);

// The connection on which `token` comes first; it never blocks. Others are strangers': each is closed once it has said
// something else, and whoever says nothing is not waited for. Throws std::runtime_error at the deadline.
Descriptor accept_from(const Descriptor& listener, const std::string& token, Clock::time_point deadline);

// The fields of a message: numbers of 4 bytes, little endian, and texts with their length before them.
class MessageWriter {
 public:
  MessageWriter& number(uint32_t value);
  MessageWriter& text(std::string_view value);
  std::string take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

// Reads what MessageWriter wrote. Throws std::runtime_error where the bytes are not of that form.
class MessageReader {
 public:
  explicit MessageReader(std::string_view bytes) : rest_(bytes) {}
  uint32_t number();
  std::string text();
  void end() const;  // nothing may be left

 private:
  std::string_view take(size_t bytes);
  std::string_view rest_;
};

struct Message {
  uint8_t kind = 0;
  std::string body;
};

// Messages over a socket that never blocks: a length (4 bytes, little endian, of what follows), a kind (1 byte), a
// body.
class Connection {
 public:
  // Bodies of at most `longest` bytes are taken.
  Connection(Descriptor socket, size_t longest);

  int descriptor() const { return socket_.number(); }
  void allow(size_t longest) { longest_ = longest; }

  void push(uint8_t kind, std::string_view body);  // to be sent by flush()
  bool has_output() const { return !output_.empty(); }
  // Sends what the socket takes. False when the connection is lost.
  bool flush();
  // Takes what has arrived. False when the other side has closed, or the connection is lost; what arrived before is
  // still there for next().
  bool fill();
  // The next whole message. Throws std::runtime_error for one that is too long.
  std::optional<Message> next();
  void end_output();  // the other side sees the end after what was sent

 private:
  Descriptor socket_;
  size_t longest_;
  std::string input_, output_;
};
