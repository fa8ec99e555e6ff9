// Angles of a token: its position, cos and sin of its planes, in rows that the sweeps over heads
// read as they are (Order).
#pragma once
#include "common/cpu/math.h"
#include "common/cpu/partial.h"
#include "grape/rotary_cpu.h"

namespace df::cpu::DF_ISA {
struct Token {
  int64_t b, t;
  int64_t sequence, position;  // of the sequence's offset; integer position without `positions`
};

inline int64_t index_at(const void* p, bool is64, int64_t i) {
  return is64 ? static_cast<const int64_t*>(p)[i] : int64_t(static_cast<const int32_t*>(p)[i]);
}

inline Token token_at(const RotaryArgs& p, int64_t n) {
  const RotaryPositions& x = p.positions;
  Token at{n / p.T, n % p.T, n / p.T, n % p.T};
  if (x.cu_seqlens) {
    int64_t low = 0, high = x.N - 1;  // the last sequence that begins at or before t
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (index_at(x.cu_seqlens, x.cu64, middle) <= at.t)
        low = middle;
      else
        high = middle - 1;
    }
    at.sequence = low;
    at.position = at.t - (x.N ? index_at(x.cu_seqlens, x.cu64, low) : 0);
  }
  at.position += x.offset;
  if (x.offsets) at.position += index_at(x.offsets, x.offsets64, at.sequence);
  return at;
}

// Position a of the token's head hp, as an integer and as a real number.
inline int64_t whole_position(const RotaryArgs& p, const Token& at, int64_t hp, int64_t a) {
  const RotaryPositions& x = p.positions;
  if (x.type == PositionType::none) return at.position;
  const int64_t i = at.b * x.b + at.t * x.t + hp * x.h + a * x.a;
  return index_at(x.data, x.type == PositionType::i64, i);
}
inline bool is_real(const RotaryArgs& p) {
  return p.positions.type == PositionType::f32 || p.positions.type == PositionType::f64;
}
inline double real_position(const RotaryArgs& p, const Token& at, int64_t hp, int64_t a) {
  const RotaryPositions& x = p.positions;
  if (!is_real(p)) return double(whole_position(p, at, hp, a));
  const int64_t i = at.b * x.b + at.t * x.t + hp * x.h + a * x.a;
  return x.type == PositionType::f64 ? static_cast<const double*>(x.data)[i]
                                     : double(static_cast<const float*>(x.data)[i]);
}

// sin and cos of x quarter turns, |x| <= 1/2: Taylor series in x, below half a unit of the last
// place at the ends of the interval.
template <class T>
inline void quarter_sincos(Vec<T> x, Vec<T>& sin, Vec<T>& cos) {
  const Vec<T> z = x * x;
  if constexpr (sizeof(T) == 4) {
    constexpr T s[] = {T(1.6044118478735982e-4), T(-4.6817541353186881e-3),
                       T(7.9692626246167046e-2), T(-6.4596409750624625e-1), T(1.5707963267948966)};
    constexpr T c[] = {T(-2.5202042373060605e-5), T(9.1926027483942659e-4),
                       T(-2.0863480763352961e-2), T(2.5366950790104802e-1),
                       T(-1.2337005501361698),    T(1)};
    sin = x * horner<T>(z, s), cos = horner<T>(z, c);
  } else {
    constexpr T s[] = {
        T(6.0669357311061957e-12), T(-6.6880351098114670e-10), T(5.6921729219679268e-8),
        T(-3.5988432352120853e-6), T(1.6044118478735982e-4),   T(-4.6817541353186881e-3),
        T(7.9692626246167046e-2),  T(-6.4596409750624625e-1),  T(1.5707963267948966)};
    constexpr T c[] = {T(-5.2944002007340012e-13), T(6.5659631149794723e-11),
                       T(-6.3866030837918522e-9),  T(4.7108747788181715e-7),
                       T(-2.5202042373060605e-5),  T(9.1926027483942659e-4),
                       T(-2.0863480763352961e-2),  T(2.5366950790104802e-1),
                       T(-1.2337005501361698),     T(1)};
    sin = x * horner<T>(z, s), cos = horner<T>(z, c);
  }
}

// Of C and S in a row.
enum class Order {
  planes,
  doubled,  // every C twice, and (-S, S) in turn: for pairs that stay side by side in a vector
  paired    // of two vectors of planes first the even ones: for 16-bit elements in 32-bit words
};

template <class T>
class Angles {
  using I = typename Bits<T>::I;

 public:
  Angles(const RotaryCpu& call, Order order, char* scratch)
      : call_(call), p_(call.args), order_(order) {
    width_ = round_up<T>(order == Order::doubled ? 2 * p_.P : p_.P);
    const auto take = [&](int64_t bytes) {
      char* at = scratch;
      scratch += (bytes + 63) / 64 * 64;
      return at;
    };
    const int64_t heads = p_.Ha * width_ * int64_t(sizeof(T));
    const int64_t planes = round_up<float>(p_.P) * 8;
    for (int i = 0; i < 2; ++i) {
      C_[i] = reinterpret_cast<T*>(take(heads));
      S_[i] = reinterpret_cast<T*>(take(heads));
    }
    turn_ = reinterpret_cast<uint64_t*>(take(planes));
    angle_ = reinterpret_cast<double*>(turn_);
    x_ = reinterpret_cast<T*>(take(planes));
    quadrant_ = reinterpret_cast<I*>(take(planes));
    end_ = scratch;
  }
  char* end() const { return end_; }
  const T* C(bool of_k, int64_t head) const { return C_[of_k && distinct()] + head * width_; }
  const T* S(bool of_k, int64_t head) const { return S_[of_k && distinct()] + head * width_; }
  bool distinct() const { return p_.cos_k.data; }  // tables of k are others than those of q

  void token(const Token& at) {
    if (p_.cos_q.data) return tables(at);
    for (int64_t h = 0; h < p_.Ha; ++h) {
      const int64_t hp = p_.positions.Hp == 1 ? 0 : h, hf = p_.Hf == 1 ? 0 : h;
      if (is_real(p_))
        real(at, hp, hf);
      else
        whole(at, hp, hf);
      if (!call_.finite) poison(hf);
      trigonometry(C_[0] + h * width_, S_[0] + h * width_);
    }
  }

 private:
  // x_ in quarter turns and the quadrant from integer positions: products modulo a turn.
  void whole(const Token& at, int64_t hp, int64_t hf) {
    const int64_t P = p_.P;
    for (int64_t i = 0; i < P; ++i) turn_[i] = 0;
    for (int64_t a = 0; a < p_.A; ++a) {
      const uint64_t position = uint64_t(whole_position(p_, at, hp, a));
      const uint64_t* turns = call_.turns + (hf * p_.A + a) * P;
      for (int64_t i = 0; i < P; ++i) turn_[i] += position * turns[i];
    }
    if constexpr (sizeof(T) == 4) {
      for (int64_t i = 0; i < P; ++i) {
        // rounded, not truncated: so that -f gives the bits of f
        const uint32_t turn = uint32_t((turn_[i] + 0x80000000u) >> 32);
        const uint32_t quarter = (turn + 0x20000000u) >> 30;
        quadrant_[i] = I(quarter);
        x_[i] = T(int32_t(turn - (quarter << 30))) * T(0x1p-30);
      }
    } else {
      for (int64_t i = 0; i < P; ++i) {
        const uint64_t turn = turn_[i], quarter = (turn + (uint64_t(1) << 61)) >> 62;
        quadrant_[i] = I(quarter);
        x_[i] = T(int64_t(turn - (quarter << 62))) * T(0x1p-62);
      }
    }
  }

  // The same from real positions: products in double, reduced in two parts.
  void real(const Token& at, int64_t hp, int64_t hf) {
    constexpr double kTwoOverPi = 0.63661977236758138, kHigh = 1.5707963267948966,
                     kLow = 6.123233995736766e-17, kRound = 0x1.8p52;
    const int64_t P = p_.P;
    for (int64_t i = 0; i < P; ++i) angle_[i] = 0;
    for (int64_t a = 0; a < p_.A; ++a) {
      const double position = real_position(p_, at, hp, a);
      const double* theta = call_.theta + (hf * p_.A + a) * P;
      for (int64_t i = 0; i < P; ++i) angle_[i] += position * theta[i];
    }
    for (int64_t i = 0; i < P; ++i) {
      const double shifted = angle_[i] * kTwoOverPi + kRound, quarters = shifted - kRound;
      double r = __builtin_fma(-quarters, kHigh, angle_[i]);
      r = __builtin_fma(-quarters, kLow, r);
      quadrant_[i] = I(bit_cast<int64_t>(shifted));
      x_[i] = T(r * kTwoOverPi);
    }
  }

  // Frequencies that are not finite make NaN.
  void poison(int64_t hf) {
    for (int64_t a = 0; a < p_.A; ++a) {
      const double* theta = call_.theta + (hf * p_.A + a) * p_.P;
      for (int64_t i = 0; i < p_.P; ++i) x_[i] += T(theta[i] - theta[i]);
    }
  }

  void trigonometry(T* C, T* S) {
    const T m = T(p_.factor), n = T(p_.sign * p_.factor);
    for (int64_t i = 0; i < p_.P; i += kLanes<T>) {
      Vec<T> sin, cos;
      quarter_sincos<T>(load(x_ + i), sin, cos);
      const Vec<I> quadrant = load(quadrant_ + i);
      const auto odd = (quadrant & 1) != 0;
      const Vec<T> s = odd ? cos : sin, c = odd ? sin : cos;
      put(C, S, i, ((quadrant + 1) & 2) != 0 ? -c * m : c * m,
          (quadrant & 2) != 0 ? -s * n : s * n);
    }
  }

  // C and S of planes [i, i + kLanes<T>), which may go beyond P.
  void put(T* C, T* S, int64_t i, Vec<T> c, Vec<T> s) {
    if (order_ == Order::planes) {
      store(C + i, c), store(S + i, s);
      return;
    }
    const int64_t n = p_.P - i < kLanes<T> ? p_.P - i : kLanes<T>;
    for (int64_t l = 0; l < n; ++l) put(C, S, i + l, c[l], s[l]);
  }
  void put(T* C, T* S, int64_t i, T c, T s) {
    constexpr int64_t kL = kLanes<T>;
    if (order_ == Order::doubled) {
      C[2 * i] = C[2 * i + 1] = c;
      S[2 * i] = -s, S[2 * i + 1] = s;
      return;
    }
    if (order_ == Order::paired) i = i / (2 * kL) * (2 * kL) + i % 2 * kL + i % (2 * kL) / 2;
    C[i] = c, S[i] = s;
  }

  void tables(const Token& at) {
    const RotaryTable* each[] = {&p_.cos_q, &p_.sin_q, &p_.cos_k, &p_.sin_k};
    int64_t row = at.t, batch = at.b;
    if (p_.rows) {
      row = whole_position(p_, at, 0, 0), batch = 0;
      if (row < 0 || row >= p_.rows) {
        __atomic_store_n(call_.bad_row, row, __ATOMIC_RELAXED);
        row = 0;
      }
    }
    for (int64_t h = 0; h < p_.Ha; ++h)
      for (int i = 0; i <= int(distinct()); ++i)
        table(*each[2 * i], *each[2 * i + 1], batch, row, h, C_[i] + h * width_,
              S_[i] + h * width_);
  }

  void table(const RotaryTable& cos, const RotaryTable& sin, int64_t b, int64_t t, int64_t h, T* C,
             T* S) {
    dispatch(cos.type, [&](auto tag) {
      using E = typename decltype(tag)::type;
      const E* c = static_cast<const E*>(cos.data) + b * cos.b + t * cos.t + h * cos.h;
      const E* s = static_cast<const E*>(sin.data) + b * sin.b + t * sin.t + h * sin.h;
      const T m = T(p_.factor), n = T(p_.sign * p_.factor);
      for (int64_t i = 0; i < p_.P; ++i)
        put(C, S, i, T(to_compute(c[i])) * m, T(to_compute(s[i])) * n);
    });
  }

  const RotaryCpu& call_;
  const RotaryArgs& p_;
  Order order_;
  int64_t width_;
  T *C_[2], *S_[2];
  uint64_t* turn_;
  double* angle_;
  T* x_;
  I* quadrant_;
  char* end_;
};
}  // namespace df::cpu::DF_ISA
