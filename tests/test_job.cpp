// test_job.cpp: ranks as threads, and as processes where one of them ends: how they meet, what they tell each other,
// who is refused, and what is said when one is lost. All on the loopback interface. Deadlines are for hangs only.
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "parallel/connection.h"
#include "parallel/job.h"
#include "parallel/launch.h"
#include "parallel/protocol.h"

namespace {

const JobOptions kPatient = {60, 60, {}};

Launch launch_of(int rank, int size, int port, const std::string& nonce = "job") {
  Launch launch;
  launch.rank = rank;
  launch.size = size;
  launch.address = "127.0.0.1";
  launch.port = port;
  launch.nonce = nonce;
  return launch;
}

// The launches of a job whose rank 0 listens already.
std::vector<Launch> launches(int size) {
  Descriptor listener = listen_at("127.0.0.1", 0);
  const int port = port_of(listener);
  std::vector<Launch> all;
  for (int rank = 0; rank < size; ++rank) all.push_back(launch_of(rank, size, port));
  all[0].listener = listener.release();
  return all;
}

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// body(job) on a thread for each rank, which then leave. Returns what each threw.
std::vector<std::string> on_ranks(int size, const std::function<void(Job&)>& body,
                                  const JobOptions& options = kPatient) {
  const std::vector<Launch> all = launches(size);
  std::vector<std::string> errors(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      errors[rank] = error_of([&] {
        const std::unique_ptr<Job> job = join_job(all[rank], options);
        EXPECT_EQ(job->rank(), rank);
        EXPECT_EQ(job->size(), size);
        EXPECT_EQ(job->local_rank(), rank);  // all on this host
        EXPECT_EQ(job->local_size(), size);
        EXPECT_EQ(job->address(), "127.0.0.1");
        body(*job);
        job->leave();
      });
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

TEST(Job, AloneGathersAndStoresWhatItHas) {
  const std::unique_ptr<Job> job = join_job(Launch{}, kPatient);
  EXPECT_EQ(job->size(), 1);
  EXPECT_EQ(job->gather("mine"), std::vector<std::string>{"mine"});
  job->set("key", "value");
  EXPECT_EQ(job->get("key"), "value");
  EXPECT_THROW(job->get("other"), std::runtime_error);
  EXPECT_TRUE(job->fail("why"));
  agree(*job, {{"fact", "1", ""}});
  job->leave();
}

TEST(Job, EverybodysTextReachesEverybodyInOrder) {
  for (const int size : {2, 3, 7}) {
    const auto text = [](int rank, int round) {
      return round == 0 ? "" : std::string(round % 5 == 0 ? 300000 : round, static_cast<char>(17 * rank + round));
    };
    const std::vector<std::string> errors = on_ranks(size, [&](Job& job) {
      for (int round = 0; round < 40; ++round) {
        const std::vector<std::string> all = job.gather(text(job.rank(), round));
        ASSERT_EQ(all.size(), static_cast<size_t>(size));
        for (int rank = 0; rank < size; ++rank) ASSERT_EQ(all[rank], text(rank, round)) << rank << " " << round;
      }
    });
    EXPECT_EQ(errors, std::vector<std::string>(size));
  }
}

TEST(Job, AKeyIsWaitedForAndHasItsBytes) {
  const std::string bytes("\0\xff key\n\0", 8);
  std::atomic<bool> set = false;
  const std::vector<std::string> errors = on_ranks(3, [&](Job& job) {
    if (job.rank() == 2) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      set = true;
      job.set("id", bytes);
      job.set("id", "a second value");  // the first one stays
    }
    EXPECT_EQ(job.get("id"), bytes);
    EXPECT_TRUE(set);
    EXPECT_EQ(job.get("id"), bytes);
  });
  EXPECT_EQ(errors, std::vector<std::string>(3));
}

TEST(Job, AKeyThatNobodySetsIsAnError) {
  const std::vector<std::string> errors =
      on_ranks(2,
               [](Job& job) {
                 EXPECT_EQ(error_of([&] { job.get("id"); }), "no rank has set id within 0.5 s (--rendezvous-timeout)");
               },
               {0.5, 60, {}});
  // A slow machine may not have both ranks within half a second, which is said, too.
  for (const std::string& error : errors) EXPECT_TRUE(error.empty() || error.find("within 0.5 s") < 100) << error;
}

TEST(Job, ThoseThatAreMissingAreNamed) {
  const std::vector<Launch> all = launches(5);
  std::vector<std::string> errors(5);
  std::thread one([&] { errors[3] = error_of([&] { join_job(all[3], kPatient); }); });
  errors[0] = error_of([&] { join_job(all[0], {3, 60, {}}); });
  one.join();
  EXPECT_EQ(errors[0], "ranks 1, 2, 4 of 5 have not come within 3 s (--rendezvous-timeout); rank 0 waits at port " +
                           std::to_string(all[0].port));
  EXPECT_EQ(errors[3], errors[0]);
}

TEST(Job, WhereRank0IsMissingThatIsSaid) {
  int port;
  {
    const Descriptor listener = listen_at("127.0.0.1", 0);
    port = port_of(listener);
  }
  const std::string error = error_of([&] { join_job(launch_of(1, 2, port), {0.3, 60, {}}); });
  EXPECT_EQ(error, "rank 0 does not answer at 127.0.0.1 port " + std::to_string(port) +
                       " within 0.3 s (--rendezvous-timeout): Connection refused");
}

TEST(Job, ABusyPortIsNamedWithTheFlag) {
  const Descriptor listener = listen_at("127.0.0.1", 0);
  const int port = port_of(listener);
  EXPECT_EQ(
      error_of([&] { join_job(launch_of(0, 2, port), kPatient); }),
      "port " + std::to_string(port) +
          " is in use by another program or another run; rank 0 needs it: another --rendezvous-port, for all ranks");
}

TEST(Job, StrangersAreRefusedAndTheJobGoesOn) {
  const std::vector<Launch> all = launches(2);
  std::thread rank0([&] {
    const std::unique_ptr<Job> job = join_job(all[0], kPatient);
    job->gather("");
    job->gather("");
    job->leave();
  });
  const auto refused = [&](const Launch& launch) { return error_of([&] { join_job(launch, kPatient); }); };
  const std::string at = "rank 0 at 127.0.0.1 port " + std::to_string(all[0].port) + " does not let this process in: ";
  EXPECT_EQ(refused(launch_of(1, 2, all[0].port, "an earlier job")), at + "it is another job's");
  EXPECT_EQ(refused(launch_of(1, 3, all[0].port)), at + "it has 2 ranks, not 3");
  const std::unique_ptr<Job> job = join_job(all[1], kPatient);
  job->gather("");
  EXPECT_NE(refused(all[1]).find("already"), std::string::npos);
  EXPECT_EQ(refused(launch_of(1, 2, all[0].port, "a later job")), at + "it is another job's");
  job->gather("");
  job->leave();
  rank0.join();
}

// Random bytes, beginnings of hellos, and whole ones whose fields lie about their lengths, before the job has met and
// while it runs.
TEST(Job, BytesFromAnybodyDoNoHarm) {
  const std::vector<Launch> all = launches(2);
  std::mt19937 random(7);
  const auto disturb = [&](int times) {
    for (int i = 0; i < times; ++i) {
      const Descriptor socket = connect_to("127.0.0.1", all[0].port, Clock::now() + std::chrono::seconds(60));
      std::string bytes;
      if (i % 3 > 0) {
        const std::string hello =
            MessageWriter().text(kProtocol).text("job").number(1).number(2).text("h").number(9).take();
        bytes = MessageWriter().number(static_cast<uint32_t>(hello.size() + 1)).take() + '\0' + hello;
        if (i % 3 == 1) bytes.resize(random() % bytes.size());
        if (i % 3 == 2) bytes[random() % (bytes.size() - 30)] = static_cast<char>(0x80 | random());
      } else {
        bytes.resize(random() % 20000);
        for (char& byte : bytes) byte = static_cast<char>(random());
        if (i % 2 == 0 && bytes.size() > 4) bytes[2] = bytes[3] = 0;  // a length that is allowed
      }
      if (send(socket.number(), bytes.data(), bytes.size(), MSG_NOSIGNAL) < 0) continue;  // refused already
    }
  };
  std::thread rank0([&] {
    const std::unique_ptr<Job> job = join_job(all[0], kPatient);
    for (int i = 0; i < 3; ++i) job->gather("");
    job->leave();
  });
  disturb(150);
  const std::unique_ptr<Job> job = join_job(all[1], kPatient);
  for (int i = 0; i < 3; ++i) {
    disturb(100);
    EXPECT_EQ(job->gather("text")[1], "text");
  }
  job->leave();
  rank0.join();
}

TEST(Messages, AreReadAsTheyAreWrittenOrNotAtAll) {
  const std::string bytes = MessageWriter().text("a\0b").number(0x81020304).text("").take();
  MessageReader reader(bytes);
  EXPECT_EQ(reader.text(), "a");  // a literal ends there
  EXPECT_EQ(reader.number(), 0x81020304u);
  EXPECT_THROW(reader.end(), std::runtime_error);
  EXPECT_EQ(reader.text(), "");
  reader.end();
  EXPECT_THROW(reader.number(), std::runtime_error);
  EXPECT_THROW(MessageReader(MessageWriter().number(UINT32_MAX).take()).text(), std::runtime_error);
}

TEST(Agreement, ADifferenceIsOneLineOnEveryRank) {
  const std::vector<std::string> errors = on_ranks(3, [](Job& job) {
    agree(job, {{"--steps", "10", ""}, {"--lr", "0.002", ""}});
    agree(job, {{"--steps", "10", ""}, {"--lr", job.rank() == 1 ? "0.001" : "0.002", "give all the same"}});
  });
  EXPECT_EQ(errors, std::vector<std::string>(3, "rank 1 has another --lr (0.001, rank 0: 0.002); give all the same"));
}

TEST(Agreement, OtherFactsAreAnotherProgram) {
  const std::vector<std::string> errors = on_ranks(2, [](Job& job) {
    agree(job, std::vector<Fact>(static_cast<size_t>(job.rank()) + 1, {"a", "1", ""}));
  });
  EXPECT_EQ(errors, std::vector<std::string>(2, "rank 1 runs another program than rank 0"));
}

TEST(Agreement, ADeviceBelongsToOneRank) {
  EXPECT_EQ(on_ranks(3, [](Job& job) { refuse_shared_device(job, ""); }), std::vector<std::string>(3));
  const std::vector<std::string> errors =
      on_ranks(3, [](Job& job) { refuse_shared_device(job, job.rank() == 1 ? "aa" : "bb"); });
  EXPECT_EQ(errors, std::vector<std::string>(3,
                                             "ranks 0 and 2 have one GPU, bb: give each its own (LOCAL_RANK, "
                                             "CUDA_VISIBLE_DEVICES)"));
}

// ---- ranks as processes

struct Process {
  pid_t pid;
  Descriptor said;

  std::string lines() const {
    std::string text;
    char bytes[4096];
    for (ssize_t count; (count = read(said.number(), bytes, sizeof bytes)) > 0;) text.append(bytes, count);
    return text;
  }
  // The exit code, or 128 + the signal.
  int code() const {
    int status;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
};

// body(job, say) in a process of its own for each rank.
using Body = std::function<int(Job&, const std::function<void(const std::string&)>&)>;
std::vector<Process> start(int size, double comm_timeout, const Body& body) {
  const std::vector<Launch> all = launches(size);
  std::vector<Process> processes;
  for (int rank = 0; rank < size; ++rank) {
    int ends[2];
    if (pipe(ends) != 0) throw std::runtime_error("no pipe");
    const pid_t pid = fork();
    if (pid == 0) {
      const auto say = [&](const std::string& line) {
        const std::string text = line + "\n";
        if (write(ends[1], text.data(), text.size()) < 0) _exit(99);
      };
      if (rank > 0) close(all[0].listener);
      close(ends[0]);
      alarm(120);  // nothing hangs for ever
      try {
        const std::unique_ptr<Job> job = join_job(all[rank], {60, comm_timeout, say});
        const int code = body(*job, say);
        _exit(code);
      } catch (const std::exception& error) {
        say(std::string("thrown: ") + error.what());
        _exit(98);
      }
    }
    close(ends[1]);
    processes.push_back({pid, Descriptor(ends[0])});
  }
  close(all[0].listener);
  return processes;
}

// A rank that has said "ready" waits, or computes, for ever.
Body busy(bool computes) {
  return [computes](Job& job, const std::function<void(const std::string&)>& say) {
    job.set_last_checkpoint("runs/a/step_00000004");
    job.gather("");
    say("ready");
    if (job.rank() == 1 || computes) {
      for (;;) std::this_thread::yield();
    }
    job.gather("");  // which rank 1 never does
    return 0;
  };
}

void wait_until_ready(const Process& process) {
  char bytes[6];
  size_t got = 0;
  while (got < sizeof bytes) {
    const ssize_t count = read(process.said.number(), bytes + got, sizeof bytes - got);
    ASSERT_GT(count, 0);
    got += static_cast<size_t>(count);
  }
  ASSERT_EQ(std::string(bytes, 6), "ready\n");
}

std::string line_about(const Process& victim, int rank, const std::string& how) {
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  return member_name(static_cast<uint32_t>(rank), host, static_cast<uint32_t>(victim.pid)) + how +
         "; last checkpoint: runs/a/step_00000004\n";
}

TEST(Death, AKilledRankIsNamedByAllOthersWhateverTheyDo) {
  for (const bool computes : {false, true}) {
    for (const int victim : {0, 1, 2}) {
      const std::vector<Process> ranks = start(3, 60, busy(computes));
      for (const Process& rank : ranks) wait_until_ready(rank);
      kill(ranks[victim].pid, SIGKILL);
      for (int rank = 0; rank < 3; ++rank) {
        EXPECT_EQ(ranks[rank].lines(), rank == victim ? "" : line_about(ranks[victim], victim, " is gone"));
        EXPECT_EQ(ranks[rank].code(), rank == victim ? 128 + SIGKILL : 1);
      }
    }
  }
}

TEST(Death, AStoppedRankIsMissedAfterTheTimeout_Slow) {
  for (const int victim : {0, 1}) {
    const std::vector<Process> ranks = start(3, 5, busy(false));
    for (const Process& rank : ranks) wait_until_ready(rank);
    kill(ranks[victim].pid, SIGSTOP);
    for (int rank = 0; rank < 3; ++rank) {
      if (rank == victim) continue;
      EXPECT_EQ(ranks[rank].lines(), line_about(ranks[victim], victim, " has not answered for 5 s (--comm-timeout)"));
      EXPECT_EQ(ranks[rank].code(), 1);
    }
    kill(ranks[victim].pid, SIGKILL);
    EXPECT_EQ(ranks[victim].code(), 128 + SIGKILL);
  }
}

TEST(Death, AJobThatIsStoppedAsAWholeGoesOn_Slow) {
  const std::vector<Process> ranks = start(3, 5, [](Job& job, const auto& say) {
    job.gather("");
    say("ready");
    std::this_thread::sleep_for(std::chrono::seconds(9));
    job.gather("");
    job.leave();
    return 0;
  });
  for (const Process& rank : ranks) wait_until_ready(rank);
  for (const Process& rank : ranks) kill(rank.pid, SIGSTOP);
  std::this_thread::sleep_for(std::chrono::seconds(8));
  for (const Process& rank : ranks) kill(rank.pid, SIGCONT);
  for (const Process& rank : ranks) {
    EXPECT_EQ(rank.lines(), "");
    EXPECT_EQ(rank.code(), 0);
  }
}

TEST(Death, WhyARankFailedIsSaidByTheOthers) {
  for (const int failing : {0, 1}) {
    const std::vector<Process> ranks = start(3, 60, [failing](Job& job, const auto& say) {
      job.gather("");
      if (job.rank() == failing) {
        if (job.fail("the disk is full")) say("the disk is full");
        return 1;
      }
      job.gather("");
      return 0;
    });
    for (int rank = 0; rank < 3; ++rank) {
      EXPECT_EQ(ranks[rank].lines(), rank == failing ? "the disk is full\n"
                                                     : "rank " + std::to_string(failing) +
                                                           " failed: the disk is full; last checkpoint: none yet\n");
      EXPECT_EQ(ranks[rank].code(), 1);
    }
  }
}

TEST(Death, TheSameFailureOfAllIsSaidOnce) {
  const std::vector<Process> ranks = start(3, 60, [](Job& job, const auto& say) {
    job.gather("");
    if (job.fail("the loss is not finite")) say("the loss is not finite");
    return 1;
  });
  std::string all;
  for (const Process& rank : ranks) {
    all += rank.lines();
    EXPECT_EQ(rank.code(), 1);
  }
  EXPECT_EQ(all, "the loss is not finite\n");
}

// What fails because another rank is gone does not hide that.
TEST(Death, TheCauseIsSaidAndNotWhatFollowsFromIt) {
  const std::vector<Process> ranks = start(3, 60, [](Job& job, const auto& say) {
    job.set_last_checkpoint("runs/a/step_00000004");
    job.gather("");
    say("ready");
    job.gather("");  // until all have said it
    if (job.rank() == 1) _exit(7);
    if (job.fail("connection closed by peer")) say("connection closed by peer");
    return 1;
  });
  for (const Process& rank : ranks) wait_until_ready(rank);
  for (const int rank : {0, 2}) {
    EXPECT_EQ(ranks[rank].lines(), line_about(ranks[1], 1, " is gone"));
    EXPECT_EQ(ranks[rank].code(), 1);
  }
  EXPECT_EQ(ranks[1].code(), 7);
}

TEST(Death, NobodyIsMissedWhoHasLeft) {
  const std::vector<Process> ranks = start(3, 60, [](Job& job, const auto&) {
    if (job.rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(500));  // the others wait for it
    job.leave();
    return 0;
  });
  for (const Process& rank : ranks) {
    EXPECT_EQ(rank.lines(), "");
    EXPECT_EQ(rank.code(), 0);
  }
}

}  // namespace
