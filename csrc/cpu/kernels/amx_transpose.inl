// Transposing 16 x 16 words of 32 bits with AVX-512, for tiles of AMX. Included like elementwise.inl, also where the
// compiler's flags lack AVX-512: a machine with AVX-512 and without AMX can test it.

// `from`: 16 rows of 64 bytes, `stride` bytes apart. `to`, aligned: 16 rows of 64 bytes, the k-th of all rows' words k.
[[gnu::target("avx512f")]] inline void transpose_words(const std::uint8_t* from, std::size_t stride, std::uint8_t* to) {
  using Quarter = const __m128i*;
  // The forms without a mask, which means the same instructions, make GCC 12 warn of its own undefined registers.
  constexpr __mmask16 kWords = 0xffff;
  constexpr __mmask8 kPairs = 0xff;
  for (int column = 0; column < 4; ++column) {
    // Four words of rows j, 4 + j, 8 + j and 12 + j, so that what is left are transpositions within quarters. Inserting
    // from memory spares the one port that shuffles.
    __m512i rows[4];
    const std::uint8_t* at = from + column * 16;
    for (int j = 0; j < 4; ++j, at += stride) {
      __m512i row = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<Quarter>(at)));
      row = _mm512_inserti32x4(row, _mm_loadu_si128(reinterpret_cast<Quarter>(at + 4 * stride)), 1);
      row = _mm512_inserti32x4(row, _mm_loadu_si128(reinterpret_cast<Quarter>(at + 8 * stride)), 2);
      rows[j] = _mm512_inserti32x4(row, _mm_loadu_si128(reinterpret_cast<Quarter>(at + 12 * stride)), 3);
    }
    const __m512i low01 = _mm512_maskz_unpacklo_epi32(kWords, rows[0], rows[1]);
    const __m512i high01 = _mm512_maskz_unpackhi_epi32(kWords, rows[0], rows[1]);
    const __m512i low23 = _mm512_maskz_unpacklo_epi32(kWords, rows[2], rows[3]);
    const __m512i high23 = _mm512_maskz_unpackhi_epi32(kWords, rows[2], rows[3]);
    std::uint8_t* const out = to + column * 256;
    _mm512_store_si512(out, _mm512_maskz_unpacklo_epi64(kPairs, low01, low23));
    _mm512_store_si512(out + 64, _mm512_maskz_unpackhi_epi64(kPairs, low01, low23));
    _mm512_store_si512(out + 128, _mm512_maskz_unpacklo_epi64(kPairs, high01, high23));
    _mm512_store_si512(out + 192, _mm512_maskz_unpackhi_epi64(kPairs, high01, high23));
  }
}
