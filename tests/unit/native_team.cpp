// Callers that run items and one that changes the number of threads meanwhile: each item runs exactly once.
#include "team.h"

#include <cstdio>
#include <random>

int main() {
    Team& team = Team::instance();
    std::atomic<int> callers{3};
    std::atomic<long> wrong{0};
    auto call = [&](int seed) {
        std::mt19937 random(seed);
        const long counts[] = {0, 1, 2, 3, 5, 7, 8, 9, 16, 31, 100, 1000};
        for (int turn = 0; turn < 60000; turn++) {
            std::vector<int> seen(counts[random() % 12]);
            team.run(static_cast<long>(seen.size()), [&](long item) { seen[item]++; });
            for (int times : seen) wrong += times != 1;
        }
        callers--;
    };
    std::vector<std::thread> all;
    for (int i = 0; i < 3; i++) all.emplace_back(call, i);
    all.emplace_back([&] {
        std::mt19937 random(99);
        while (callers) {
            team.resize(1 + random() % 8);
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
        }
    });
    for (auto& each : all) each.join();
    std::printf("%ld items did not run once\n", wrong.load());
    std::fflush(stdout);
    _Exit(wrong != 0);  // the team's threads never end
}
