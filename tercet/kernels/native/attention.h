// Paged attention of any number of sequences, each with one row (decode) or many (a chunk of a prompt).
//
// Keys are taken in tiles of TILE, aligned to the sequence's first token; each tile has a softmax of its own, and tiles
// are merged in order by their log-sum-exp. So a row's result depends on its own sequence alone: not on the batch, the
// chunk that it is in, or the number of threads.
#pragma once

#include "attention_amx.h"

constexpr long MOST_PARTIALS = 8 << 20;  // floats
constexpr long RUNS = 8;  // pieces of a batch for each thread

struct Span {  // one sequence's part of the batch
    int64_t row, rows;          // its rows of the batch, the last tokens of its context
    int64_t context;            // tokens in the cache, these included
    const int64_t* table;       // its blocks
};

struct Item {  // query tokens first .. last of a span, all their heads
    const Span* span;
    long first, last;

    long tokens() const { return last - first; }
    long position(long token) const { return span->context - span->rows + token; }
    long low(const Attention& a) const {  // the first key that any of them sees
        return a.window ? std::max<long>(0, position(first) - a.window + 1) : 0;
    }
    long high() const { return position(last - 1) + 1; }
};

// Adds a tile's partial result to what the tiles before it gave.
static inline void merge(Partial sofar, Partial tile, long rows, long width) {
    for (long first = 0; first < rows; first += W) {
        int count = static_cast<int>(std::min<long>(W, rows - first));
        vf before = load(sofar.largest + first, count), now = load(tile.largest + first, count), top = larger(before, now);
        vf old = power_of_two(before - top), fresh = power_of_two(now - top);
        for (int i = 0; i < count; i++) {
            long r = first + i;
            if (tile.total[r] == 0) continue;  // it sees no key of this tile
            float *to = sofar.values + r * width, *from = tile.values + r * width;
            for (long d = 0; d < width; d += W) store(to + d, load(to + d) * old[i] + load(from + d) * fresh[i]);
            sofar.total[r] = sofar.total[r] * old[i] + tile.total[r] * fresh[i];
            sofar.largest[r] = top[i];
        }
    }
}

static inline void begin(Partial sofar, long rows, long width) {
    for (long r = 0; r < rows; r++) sofar.largest[r] = -INFINITY, sofar.total[r] = 0;
    memset(sofar.values, 0, rows * width * sizeof(float));
}

// Calls row(r, token of the batch, query head) for each row, in the order above.
template <class Row>
static inline void for_rows(const Item& item, const Attention& a, const Row& row) {
    long r = 0, group = a.group();
    for (long head = 0; head < a.cache.kv_heads; head++)
        for (long token = item.first; token < item.last; token++)
            for (long g = 0; g < group; g++) row(r++, item.span->row + token, head * group + g);
}

static inline void finish(const Item& item, const Attention& a, Partial sofar, long width) {
    long dim = a.cache.dim;
    for_rows(item, a, [&](long r, long token, long head) {
        float* to = a.out + (token * a.heads + head) * dim;
        for (long d = 0; d < dim; d++) to[d] = sofar.values[r * width + d] / sofar.total[r];
    });
}

// By KV head, as Kind packs the rows of each.
template <class Kind>
static inline void pack_query(const Item& item, const Attention& a, float* query) {
    long rows = item.tokens() * a.group(), size = Kind::query_size(a, rows);
    for_rows(item, a, [&](long r, long token, long head) {
        Kind::pack_query(a, rows, r % rows, a.query + token * a.ldq + head * a.cache.dim, query + r / rows * size);
    });
}

// The items of a batch, and where each one's tiles begin in one line of all tiles.
template <class Kind>
struct Items {
    const Attention& a;
    std::vector<Item> all;
    std::vector<long> tiles{0};
    long most_rows = 0;

    Items(const Attention& a, const Span* spans, long count) : a(a) {
        long tokens = std::max<long>(1, Kind::BLOCK_ROWS / a.group());
        for (long s = 0; s < count; s++)
            for (long first = 0; first < spans[s].rows; first += tokens) {
                Item item{spans + s, first, std::min<long>(spans[s].rows, first + tokens)};
                all.push_back(item);
                tiles.push_back(tiles.back() + (item.high() + TILE - 1) / TILE - item.low(a) / TILE);
                most_rows = std::max(most_rows, rows(all.size() - 1));
            }
    }
    long count() const { return static_cast<long>(all.size()); }
    long rows(long i) const { return all[i].tokens() * a.heads; }
    long of_tile(long number) const { return std::upper_bound(tiles.begin(), tiles.end(), number) - tiles.begin() - 1; }
    long partial_size() const { return most_rows * (a.width() + 2) + Kind::spare(a); }
    long query_size() const { return Kind::query_size(a, most_rows / a.cache.kv_heads) * a.cache.kv_heads; }

    void find(long i, long number, Place<typename Kind::Stored>& place) const {
        long first = (all[i].low(a) / TILE + number - tiles[i]) * TILE;
        place.find(a.cache, all[i].span->table, first, std::min(first + TILE, all[i].high()));
    }
};

// Rows of the packed query, and of a partial of all KV heads: by KV head, then token, then query head of that KV head.
// partial(head) is where the result of one goes, and take(head, partial) gets it at once, while it is in the cache.
template <class Kind, class P, class Where, class Take>
static void attend_tile(const Attention& a, const Item& item, const float* query, const P& place, const P* next, const Where& partial,
                        const Take& take) {
    long rows = item.tokens() * a.group(), size = Kind::query_size(a, rows);
    typename Kind::Held held(rows);
    for (long head = 0; head < a.cache.kv_heads; head++) {
        Queries queries{query + head * size, rows, a.group(), item.position(item.first)};
        Partial out = partial(head);
        Kind::attend(a, queries, head, place, next, out);
        take(head, out);
    }
}

// Tiles first .. last of the line; take(item, tile, head, partial) gets what each gives, in the partial of
// partial(item, tile, head).
template <class Kind, class Where, class Take>
static void attend_run(const Items<Kind>& items, long first, long last, const Where& partial, const Take& take) {
    float* query = scratch<float, 4>(items.query_size());
    using P = Place<typename Kind::Stored>;
    P places[2];
    long i = items.of_tile(first), next = i;
    items.find(i, first, places[0]);
    for (long number = first, packed = -1; number < last; number++, i = next) {
        if (packed != i) pack_query<Kind>(items.all[i], items.a, query), packed = i;
        if (number + 1 == items.tiles[i + 1]) next = i + 1;
        const P& here = places[(number - first) % 2];
        P* ahead = number + 1 < last ? &places[(number - first + 1) % 2] : nullptr;
        if (ahead) items.find(next, number + 1, *ahead);
        auto of_head = [&](long head) { return partial(i, number, head); };
        attend_tile<Kind>(items.a, items.all[i], query, here, ahead, of_head, [&](long head, Partial out) { take(i, number, head, out); });
    }
}

// Calls run(first, last) for pieces of 0 .. count, on the team.
template <class Run>
static void in_runs(long count, const Run& run) {
    Team& team = Team::instance();
    long size = team.threads() == 1 ? count : std::max<long>(1, count / (RUNS * team.threads()));
    team.run((count + size - 1) / std::max<long>(1, size), [&](long r) { run(r * size, std::min(count, (r + 1) * size)); });
}

// Of many items, each merges its own tiles one by one.
template <class Kind>
static void attend_whole(const Items<Kind>& items) {
    long width = items.a.width(), heads = items.a.cache.kv_heads;
    in_runs(items.count(), [&](long first, long last) {
        float* memory = scratch<float, 5>(2 * items.partial_size());
        auto own = [&](long i, long, long) { return Partial(memory + items.partial_size(), items.rows(i) / heads); };
        attend_run(items, items.tiles[first], items.tiles[last], own, [&](long i, long number, long head, Partial tile) {
            long rows = items.rows(i) / heads;
            Partial all(memory, items.rows(i)), sofar = all.from(head * rows, width);
            if (number == items.tiles[i]) begin(sofar, rows, width);
            merge(sofar, tile, rows, width);
            if (number + 1 == items.tiles[i + 1] && head + 1 == heads) finish(items.all[i], items.a, all, width);
        });
    });
}

// A few long contexts are divided by tiles, whose partial results are merged afterwards.
template <class Kind>
static void attend_divided(const Items<Kind>& items) {
    long size = items.partial_size(), width = items.a.width();
    float* partials = scratch<float, 3>(items.tiles.back() * size);
    auto partial = [&](long i, long number) { return Partial(partials + number * size, items.rows(i)); };
    auto of_head = [&](long i, long number, long head) {
        return partial(i, number).from(head * items.rows(i) / items.a.cache.kv_heads, width);
    };
    in_runs(items.tiles.back(), [&](long first, long last) { attend_run(items, first, last, of_head, [](long, long, long, Partial) {}); });
    Team::instance().run(items.count(), [&](long i) {
        Partial sofar(scratch<float, 5>(size), items.rows(i));
        begin(sofar, items.rows(i), width);
        for (long number = items.tiles[i]; number < items.tiles[i + 1]; number++) merge(sofar, partial(i, number), items.rows(i), width);
        finish(items.all[i], items.a, sofar, width);
    });
}

template <class Kind>
static void attend(const Attention& a, const Span* spans, long count) {
    Items<Kind> items(a, spans, count);
    long threads = Team::instance().threads();
    bool divided = threads > 1 && items.count() < 4 * threads && items.tiles.back() * items.partial_size() <= MOST_PARTIALS;
    divided ? attend_divided(items) : attend_whole(items);
}

static void attend(const Attention& a, const Span* spans, long count) {
    if (a.cache.format == FORMAT_F32) return attend<Wide<float>>(a, spans, count);
#if defined(TERCET_AMX)
    if (amx()) return attend<Tiled>(a, spans, count);
#endif
    attend<Wide<uint16_t>>(a, spans, count);
}
