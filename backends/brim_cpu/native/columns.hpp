// Normalisation over the rows of a table, column by column: sums in blocks of rows, and rows written.
#pragma once
#include <initializer_list>

#include "moments.hpp"

namespace brim {

constexpr i64 kPieceElements = 32 * 1024, kBlockRows = 32;

struct Table {
    i64 rows, columns;
    // Short rows are worked on several at a time, as one row: loops of few numbers cost more than what they compute.
    i64 together() const { return columns > kTile / 4 ? 1 : kTile / 2 / columns; }
    i64 step() const { return kPieceElements / columns < 16 ? 16 : kPieceElements / columns / together() * together(); }
    i64 pieces() const { return ceil_div(rows, step()); }
    i64 tiles() const { return ceil_div(columns, kTile); }
};

// body(first number, how many) for the rows of a piece; where several rows are one, its columns repeat.
template <class F>
void over_rows(const Table& table, Range rows, Range columns, const F& body) {
    const i64 width = columns.end - columns.begin, together = table.together();
    i64 r = rows.begin;
    for (; r + together <= rows.end; r += together) body(r * table.columns + columns.begin, together * width);
    for (; r < rows.end; r++) body(r * table.columns + columns.begin, width);
}

// Repeats the first `width` numbers for rows that are worked on together.
template <class T>
void repeat(T* values, i64 width, const Table& table) {
    for (i64 j = width; j < table.together() * width; j++) values[j] = values[j - width];
}

// terms(sums, first, count) adds the terms of numbers side by side to `Results` rows of sums, which are added up in T
// for some rows at a time, then in double.
template <int Results, class T, class F>
void add_rows(double (&totals)[Results][kTile], const Table& table, Range rows, Range columns, const F& terms) {
    const i64 width = columns.end - columns.begin, all = table.together() * width;
    T sums[Results][kTile];
    i64 added = 0;
    for (int k = 0; k < Results; k++)
        for (i64 j = 0; j < all; j++) totals[k][j] = 0, sums[k][j] = 0;
    const auto carry = [&] {
        for (int k = 0; k < Results; k++)
            for (i64 j = 0; j < all; j++) totals[k][j] += double(sums[k][j]), sums[k][j] = 0;
        added = 0;
    };
    over_rows(table, rows, columns, [&](i64 first, i64 count) {
        terms(sums, first, count);
        if (++added == kBlockRows) carry();
    });
    carry();
    for (int k = 0; k < Results; k++)
        for (i64 j = width; j < all; j++) totals[k][j % width] += totals[k][j];
}

// The rows of a piece: compute(block, first number, first column, count).
template <class T, class F>
void write_rows(T* out, const Table& table, Range rows, Range columns, bool streamed, const F& compute) {
    over_rows(table, rows, columns, [&](i64 first, i64 all) {
        write_run(out + first, all, streamed, [&](T* to, i64 at, i64 count) { compute(to, first + at, at, count); });
    });
    if (streamed) stream_done();
}

}  // namespace brim
