// A team of threads that stays awake during a step: its work comes every few microseconds, and waking a sleeping
// thread takes longer than that.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() { std::this_thread::yield(); }
#endif

// Runs `work(item)` for each item. The caller works too, and waits only for helpers that have begun: one that the
// system has not woken yet costs nothing. Each thread has a share of the items, those that follow each other, and helps
// with the others' when it is done: what it wrote of its rows is in its own cache when it reads them in the next run.
class Team {
public:
    static Team& instance() {
        static Team* team = new Team;  // never destroyed: its threads may outlive static objects
        return *team;
    }

    // Threads that work, the caller included. All of them may use its cores: one that is there already is moved.
    void resize(int threads) {
        std::lock_guard<std::mutex> alone(one_caller_);
        cpu_set_t cores;
        bool known = !pthread_getaffinity_np(pthread_self(), sizeof cores, &cores);
        for (pthread_t helper : helpers_)
            if (known) pthread_setaffinity_np(helper, sizeof cores, &cores);
        while (static_cast<int>(helpers_.size()) < threads - 1) {
            int number = static_cast<int>(helpers_.size()) + 1;
            std::thread helper([this, number] { help(number); });
            helpers_.push_back(helper.native_handle());
            helper.detach();
        }
        while (shares_.size() < static_cast<size_t>(threads)) shares_.emplace_back();
        wanted_.store(threads - 1, std::memory_order_relaxed);
    }

    int threads() const { return wanted_.load(std::memory_order_relaxed) + 1; }

    template <class Work>
    void run(long items, const Work& work) {
        if (items <= 1 || threads() == 1) {
            for (long item = 0; item < items; item++) work(item);
            return;
        }
        std::lock_guard<std::mutex> alone(one_caller_);
        long threads = crew_ = this->threads();  // not before: another caller may just have changed it
        work_ = [](const void* w, long item) { (*static_cast<const Work*>(w))(item); };
        context_ = &work;
        for (long t = 0; t < threads; t++) {
            shares_[t].next.store(items * t / threads, std::memory_order_relaxed);
            shares_[t].end = items * (t + 1) / threads;
        }
        gate_.fetch_add(TURN, std::memory_order_seq_cst);  // open
        if (sleeping_.load(std::memory_order_seq_cst)) gate_.notify_all();
        take_items(0);
        gate_.fetch_add(TURN, std::memory_order_acq_rel);  // closed: nobody else enters
        while (gate_.load(std::memory_order_acquire) & INSIDE) relax();
    }

private:
    // The lower 16 bits of the gate count the helpers inside; the others count its openings and closings: odd is open.
    static constexpr uint64_t INSIDE = 0xffff, TURN = 1 << 16;
    static constexpr int SPINS = 20000;  // some hundred microseconds

    struct alignas(64) Share {
        std::atomic<long> next{0};
        long end = 0;
    };

    void take_items(int number) {
        for (int i = 0; i < crew_; i++) {
            Share& share = shares_[(number + i) % crew_];
            long item;
            while ((item = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end) work_(context_, item);
        }
    }

    void help(int number) {
        uint64_t seen = 0;
        for (;;) {
            uint64_t gate = wait_until_open(seen, number);
            seen = gate & ~INSIDE;
            if (!gate_.compare_exchange_strong(gate, gate + 1, std::memory_order_acq_rel)) {
                seen = 0;  // it has changed meanwhile: look again
                continue;
            }
            take_items(number);
            gate_.fetch_sub(1, std::memory_order_release);
        }
    }

    uint64_t wait_until_open(uint64_t seen, int number) {
        for (int spins = 0;; spins++) {
            uint64_t gate = gate_.load(std::memory_order_acquire);
            bool open = gate & TURN && (gate & ~INSIDE) != seen;
            if (open && number <= wanted_.load(std::memory_order_relaxed)) return gate;
            if (spins < SPINS) {
                relax();
                continue;
            }
            sleeping_.fetch_add(1, std::memory_order_seq_cst);
            gate_.wait(gate, std::memory_order_seq_cst);
            sleeping_.fetch_sub(1, std::memory_order_seq_cst);
            spins = 0;
        }
    }

    std::mutex one_caller_;
    std::atomic<uint64_t> gate_{0};
    std::atomic<int> wanted_{0}, sleeping_{0};
    std::vector<pthread_t> helpers_;
    void (*work_)(const void*, long) = nullptr;
    const void* context_ = nullptr;
    int crew_ = 1;  // threads of this run
    std::deque<Share> shares_;  // by thread; its members stay where they are
};
