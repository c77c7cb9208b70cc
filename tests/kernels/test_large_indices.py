"""More than 2^31 elements by index arithmetic: the shared headers compute places that no memory here could hold."""

from __future__ import annotations

import subprocess
from pathlib import Path

from sivae_dist.ops._toolchain import recipe

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include "bias_act/bias_act.h"
#include "common/place.h"
#include "upfirdn2d/upfirdn2d.h"

#define EXPECT(what) if (!(what)) { std::printf("%s\n", #what); return 1; }

int main() {
  using namespace sivae;
  // Axes of 2^33 pixels: every output reads what the formula says.
  const int64_t far = int64_t{1} << 33;
  for (const int up : {1, 2, 3}) for (const int down : {1, 2, 5}) for (const int pad : {-3, 0, 2}) {
    const upfirdn2d::Axis a{far, upfirdn2d::out_size(far, up, down, pad, 4), up, down, 4, pad};
    for (const int64_t o : {int64_t{0}, a.out / 2, a.out - 2, a.out - 1}) {
      const upfirdn2d::Reach r = upfirdn2d::reach(a, o);
      int count = 0;
      int64_t first = -1;
      for (int t = 0; t < 4; ++t) {
        const __int128 u = static_cast<__int128>(o) * down + t - pad;
        if (u < 0 || u % up || u / up >= far) continue;
        if (count++ == 0) first = static_cast<int64_t>(u / up);
      }
      EXPECT(count == r.count);
      if (count) EXPECT(first == r.start);
    }
  }
  // Places in a map of 2^36 elements, and the 32-bit form just below its limit.
  const int64_t channels = 513, space = (int64_t{1} << 27) + 3;
  for (const int64_t i : {int64_t{0}, (int64_t{1} << 31) + 7, (int64_t{1} << 36) + 11}) {
    const auto p = bias_act::place<int64_t>(i, channels, space, false);
    const auto q = bias_act::place<int64_t>(i, channels, space, true);
    EXPECT((p.pixel / space * channels + p.channel) * space + p.pixel % space == i);
    EXPECT(q.pixel * channels + q.channel == i);
  }
  const Shape shape{9, channels, space};
  for (const int64_t b : {int64_t{0}, int64_t{8}}) for (const int64_t c : {int64_t{0}, channels - 1}) {
    const __int128 wide = b, plane = wide * channels + c, pixel = wide * space + space - 1;
    EXPECT(shape.in_plane(b, c, space - 1) == plane * space + space - 1);
    EXPECT(shape.in_last(b, c, space - 1) == pixel * channels + c);
  }
  for (const int64_t i : {(int64_t{1} << 31) + 7, (int64_t{1} << 40) + 11}) {
    const Unit u = unit_of(i, (int64_t{1} << 20) + 1, 513);
    EXPECT((u.sample * 513 + u.middle) * ((int64_t{1} << 20) + 1) + u.inner == i);
    EXPECT(u.inner >= 0 && u.middle >= 0 && u.middle < 513 && u.inner <= int64_t{1} << 20);
  }
  for (const uint32_t i : {0u, 4294967295u, 4294967040u}) {
    const auto p = bias_act::place<uint32_t>(i, 77u, 1025u, false);
    const auto q = bias_act::place<int64_t>(i, 77, 1025, false);
    EXPECT(p.channel == q.channel && p.pixel == q.pixel);
  }
  // Half precision by whole numbers is that of torch: all of it to float, floats about each of them and others back.
  const auto same = [](float f) {
    const Half ours = narrow<Half>(f), other = static_cast<Half>(f);
    return ours.x == other.x || (f != f && (ours.x & 0x7fff) > 0x7c00);
  };
  for (uint32_t i = 0; i < 65536; ++i) {
    const Half half(static_cast<unsigned short>(i), Half::from_bits());
    const float ours = widen(half), other = static_cast<float>(half);
    const uint32_t bits = __builtin_bit_cast(uint32_t, other);
    EXPECT(__builtin_bit_cast(uint32_t, ours) == bits || (ours != ours && other != other));
    for (const uint32_t by : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x1fffu}) {
      EXPECT(same(__builtin_bit_cast(float, bits + by)));
    }
  }
  for (uint64_t k = 0; k < uint64_t{1} << 32; k += 9973) {
    EXPECT(same(__builtin_bit_cast(float, static_cast<uint32_t>(k))));
  }
  EXPECT(ceil_div(-7, 2) == -3 && floor_div(-7, 2) == -4 && ceil_div(7, 2) == 4 && floor_div(7, 2) == 3);
  return 0;
}
"""


def test_the_headers_beyond_32_bits(tmp_path: Path) -> None:
    made = recipe("cpu")
    source, program = tmp_path / "large.cpp", tmp_path / "large"
    source.write_text(PROGRAM)
    flags = [flag for flag in made.flags if not flag.startswith("-O")]
    checked = ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover"]
    command = [*made.compiler, *flags, *checked, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
