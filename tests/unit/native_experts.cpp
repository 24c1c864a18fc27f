// A mixture's experts of every shape that takes another way, with pages that nobody may touch behind and before all
// that the caller gives, and a sanitizer for the buffers between: each in a process of its own (see native_bounds.cpp).
#include <cstdio>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "moe.h"

// Zeros that end where a forbidden page begins, or begin where one ends.
template <class T>
static T* guarded(long count, bool at_end) {
    long page = sysconf(_SC_PAGESIZE), bytes = count * sizeof(T), room = (bytes + page - 1) / page * page;
    void* mapped = mmap(nullptr, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* memory = static_cast<char*>(mapped) + page;
    if (room) mprotect(memory, room, PROT_READ | PROT_WRITE);
    return reinterpret_cast<T*>(at_end ? memory + room - bytes : memory);
}

static Linear linear_of(long count, long n, long k, int format, bool at_end) {
    if (k % 2) format = FORMAT_F32;
    long words = panels_of(n) * W * k / (format == FORMAT_F32 ? 1 : 2);
    return {guarded<uint32_t>(count * words, at_end), nullptr, n, k, format};
}

static void compute(int format, long rows, long k, long hidden, long width, int64_t only, bool at_end) {
    constexpr long COUNT = 3;
    Linear gate_up = linear_of(COUNT, 2 * panels_of(width) * W, hidden, format, at_end);
    Experts experts{gate_up, linear_of(COUNT, hidden, width, format, at_end), COUNT};
    float *x = guarded<float>(rows * hidden, at_end), *y = guarded<float>(rows * hidden, at_end);
    float* weights = guarded<float>(rows * k, at_end);
    int64_t* numbers = guarded<int64_t>(rows * k, at_end);
    for (long a = 0; a < rows * k; a++) numbers[a] = only < COUNT ? only : a % (COUNT + 1) - 1;
    if (wrong_number(experts, numbers, rows * k) != -1) _Exit(1);
    experts_into(experts, x, rows, numbers, weights, k, y);
}

int main() {
    for (int threads : {1, 2})
        for (int format : {FORMAT_F32, FORMAT_BF16})
            for (long rows : {0, 1, 7, 17, 33, 100})
                for (long hidden : {1, 34, 64})
                    for (long width : {3, 32, 50})
                        for (int64_t only : {-1, 2, 3})  // all elsewhere, all to the last expert, some of each
                            for (bool at_end : {false, true}) {
                                pid_t child = fork();
                                if (child == 0) {
                                    Team::instance().resize(threads);
                                    compute(format, rows, 1 + rows % 2, hidden, width, only, at_end);
                                    _Exit(0);  // the team's threads never end
                                }
                                int status = 0;
                                waitpid(child, &status, 0);
                                if (status == 0) continue;
                                std::printf("format %d, %ld rows, %ld x %ld, only %ld, %d threads\n", format, rows,
                                            hidden, width, static_cast<long>(only), threads);
                                return 1;
                            }
}
