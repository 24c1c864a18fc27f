// Attention of every shape that takes another way, for a sanitizer to watch: each in a process of its own, since buffers of
// a thread keep the size that an earlier shape needed.
#include "library.cpp"

#include <cstdio>
#include <sys/wait.h>
#include <unistd.h>

static void attend(int format, long rows, long before, long window, long kv_heads, long group, long dim) {
    long context = rows + before, size = 16, blocks = (context + size - 1) / size, heads = kv_heads * group;
    std::vector<float> query(rows * heads * dim, 1), out(rows * heads * dim);
    std::vector<char> cache(blocks * 2 * size * kv_heads * dim * (format == FORMAT_F32 ? 4 : 2));
    std::vector<int64_t> table(blocks);
    for (long i = 0; i < blocks; i++) table[i] = i;
    Span span{0, rows, context, table.data()};
    Shape shape{0, heads, kv_heads, dim, 1e-5f, nullptr, nullptr};
    Step step{rows, nullptr, nullptr, &span, 1, cache.data(), 0, size, format};
    attention_forward(query.data(), heads * dim, &shape, &step, window, out.data());
}

int main() {
    for (int threads : {1, 2})
        for (int format : {FORMAT_F32, FORMAT_BF16})
            for (long rows : {1, 5, 24, 48, 96, 97})
                for (long before : {0, 1, 63, 130})
                    for (long window : {0, 1, 5, 64, 100})
                        for (long group : {1, 3}) {
                            pid_t child = fork();
                            if (child == 0) {
                                set_threads(threads);
                                attend(format, rows, before, window, 1 + rows % 2, group, before % 2 ? 34 : 16);
                                _Exit(0);  // the team's threads never end
                            }
                            int status = 0;
                            waitpid(child, &status, 0);
                            if (status == 0) continue;
                            std::printf("format %d, %ld rows behind %ld, window %ld, group %ld, %d threads\n", format, rows, before, window,
                                        group, threads);
                            return 1;
                        }
}
