// Rotation of q and k, one token after the other: its angles once, then a sweep over the heads of
// both tensors. A row of a head goes through registers; in place nothing else is touched.
#include "common/cpu/stream.h"
#include "grape/rotary_words.h"

namespace df::cpu::DF_ISA {
namespace {
template <class T>
inline Vec<T> swap_pairs(Vec<T> x) {
  Vec<typename Bits<T>::I> other;
  for (int l = 0; l < kLanes<T>; ++l) other[l] = l ^ 1;
  return __builtin_shuffle(x, other);
}

template <class E>
inline const E* head_of(const RotaryHeads& x, const Token& at, int64_t h) {
  return static_cast<const E*>(x.data) + at.b * x.b + at.t * x.t + h * x.h;
}
template <class E>
inline E* head_of(const RotaryOutput& x, const Token& at, int64_t h) {
  return static_cast<E*>(x.data) + at.b * x.b + at.t * x.t + h * x.h;
}

template <class E>
inline void copy_rest(const RotaryArgs& p, const E* x, E* y) {
  if (x != y && p.D > 2 * p.P)
    __builtin_memcpy(y + 2 * p.P, x + 2 * p.P, (p.D - 2 * p.P) * sizeof(E));
}

struct Store {  // how a vector of results leaves
  template <class T, class E, class Part>
  static void put(Vec<T> y, E* p, Part part) {
    store_part<T>(y, p, part);
  }
};
struct Stream {
  template <class T, class E, class Part>
  static void put(Vec<T> y, E* p, Part part) {
    if constexpr (sizeof(E) == 4 && sizeof(T) == 4 && sizeof(part) == sizeof(Whole))
      stream(p, y);
    else
      store_part<T>(y, p, part);
  }
};

template <class Out, class T, class E>
inline void rotate_head(const RotaryArgs& p, const E* x, E* y, const T* C, const T* S) {
  if (in_words<E>(p)) {
    if constexpr (kHasWords<E>)
      p.interleaved ? rotate_pairs(x, y, C, S, p.P) : rotate_halves(x, y, C, S, p.P);
  } else if (p.interleaved) {
    over_row<T>(2 * p.P, [&](int64_t c, auto part) {
      const Vec<T> v = load_part<T>(x + c, part);
      Out::template put<T>(v * load(C + c) + swap_pairs<T>(v) * load(S + c), y + c, part);
    });
  } else {
    over_row<T>(p.P, [&](int64_t c, auto part) {
      const Vec<T> x0 = load_part<T>(x + c, part), x1 = load_part<T>(x + p.P + c, part);
      const Vec<T> cos = load(C + c), sin = load(S + c);
      Out::template put<T>(x0 * cos - x1 * sin, y + c, part);
      Out::template put<T>(x0 * sin + x1 * cos, y + p.P + c, part);
    });
  }
  copy_rest(p, x, y);
}

// fn(head, of the angles, whether of k) for the heads of q, then of k.
template <class Fn>
inline void over_heads(const RotaryArgs& p, Fn fn) {
  for (int i = 0; i < 2; ++i) {
    const int64_t H = i ? p.k.H : p.q.H, group = H / p.Ha;
    for (int64_t h = 0; h < H; ++h) fn(h, h / group, i == 1);
  }
}

template <class Out, class E>
void apply(const RotaryCpu& call, int64_t first, int64_t last, char* scratch) {
  using T = Compute<E>;
  const RotaryArgs& p = call.args;
  Angles<T> angles(call, order_of<E>(p), scratch);
  for (int64_t n = first; n < last; ++n) {
    const Token at = token_at(p, n);
    angles.token(at);
    over_heads(p, [&](int64_t h, int64_t ha, bool of_k) {
      rotate_head<Out>(p, head_of<E>(of_k ? p.k : p.q, at, h),
                       head_of<E>(of_k ? p.y_k : p.y_q, at, h), angles.C(of_k, ha),
                       angles.S(of_k, ha));
    });
  }
}

// The backward pass of a token: dx = R^T dy, and sums over heads of the cross products, elementwise
// as they stand in a row; `fold` adds what belongs to one plane.
template <class E>
class Backward {
  using T = Compute<E>;

 public:
  Backward(const RotaryCpu& call, const RotaryGrads& grads, double* sums, char* scratch)
      : p_(call.args),
        g_(grads),
        sums_(sums),
        angles_(call, order_of<E>(p_), scratch),
        width_(round_up<T>(p_.interleaved ? 2 * p_.P : p_.P)) {
    T* rows = reinterpret_cast<T*>(angles_.end());
    for (int i = 0; i < 4; ++i) sum_[i] = rows + i * p_.Ha * width_;
  }

  void token(int64_t n) {
    const Token at = token_at(p_, n);
    angles_.token(at);
    const int64_t size = p_.Ha * width_;
    for (int i = 0; i < (g_.angles ? 1 : angles_.distinct() ? 4 : 2); ++i)
      for (int64_t j = 0; j < size; ++j) sum_[i][j] = 0;
    over_heads(p_, [&](int64_t h, int64_t ha, bool of_k) { head(at, h, ha, of_k); });
    if (g_.angles) {
      fold(sum_[0]);
      frequencies(at);
      if (g_.dpositions) positions(at, n);
    } else {
      tables(n, sum_[0], sum_[1], g_.dcos_q, g_.dsin_q);
      if (angles_.distinct()) tables(n, sum_[2], sum_[3], g_.dcos_k, g_.dsin_k);
    }
  }

 private:
  void head(const Token& at, int64_t h, int64_t ha, bool of_k) {
    const E* dy = head_of<E>(of_k ? p_.k : p_.q, at, h);
    const E* z = head_of<E>(of_k ? g_.saved_k : g_.saved_q, at, h);
    E* dx = head_of<E>(of_k ? p_.y_k : p_.y_q, at, h);
    const int place = of_k && angles_.distinct() && !g_.angles ? 2 : 0;
    T *cross = sum_[place] + ha * width_, *dot = sum_[place + 1] + ha * width_;
    if (p_.interleaved) {
      over_row<T>(2 * p_.P, [&](int64_t c, auto part) {
        const Vec<T> d = load_part<T>(dy + c, part), v = load_part<T>(z + c, part);
        store(cross + c, load(cross + c) + d * swap_pairs<T>(v));
        if (!g_.angles) store(dot + c, load(dot + c) + d * v);
      });
    } else {
      over_row<T>(p_.P, [&](int64_t c, auto part) {
        const Vec<T> d0 = load_part<T>(dy + c, part), d1 = load_part<T>(dy + p_.P + c, part);
        const Vec<T> z0 = load_part<T>(z + c, part), z1 = load_part<T>(z + p_.P + c, part);
        store(cross + c, load(cross + c) + (d1 * z0 - d0 * z1));
        if (!g_.angles) store(dot + c, load(dot + c) + (d0 * z0 + d1 * z1));
      });
    }
    rotate_head<Store>(p_, dy, dx, angles_.C(of_k, ha), angles_.S(of_k, ha));
  }

  // Cross products of planes, signed, in the first P elements of each head's row.
  void fold(T* cross) const {
    const T sign = T(g_.sign);
    for (int64_t ha = 0; ha < p_.Ha; ++ha, cross += width_)
      for (int64_t i = 0; i < p_.P; ++i)
        cross[i] = sign * (p_.interleaved ? cross[2 * i + 1] - cross[2 * i] : cross[i]);
  }

  void frequencies(const Token& at) const {
    const int64_t P = p_.P, A = p_.A;
    for (int64_t ha = 0; ha < p_.Ha; ++ha) {
      const T* df = sum_[0] + ha * width_;
      double* to = sums_ + (p_.Hf == 1 ? 0 : ha) * P * A;
      for (int64_t a = 0; a < A; ++a) {
        const double position = real_position(p_, at, p_.positions.Hp == 1 ? 0 : ha, a);
        for (int64_t i = 0; i < P; ++i) to[i * A + a] += position * double(df[i]);
      }
    }
  }

  double frequency(int64_t i) const {
    return p_.freqs64 ? static_cast<const double*>(p_.freqs)[i]
                      : double(static_cast<const float*>(p_.freqs)[i]);
  }
  void positions(const Token&, int64_t n) const {
    const int64_t P = p_.P, A = p_.A, Hp = p_.positions.Hp;
    double* to = g_.dpositions + n * Hp * A;
    for (int64_t i = 0; i < Hp * A; ++i) to[i] = 0;
    for (int64_t ha = 0; ha < p_.Ha; ++ha) {
      const T* df = sum_[0] + ha * width_;
      for (int64_t a = 0; a < A; ++a) {
        double sum = 0;
        for (int64_t i = 0; i < P; ++i)
          sum += frequency(((p_.Hf == 1 ? 0 : ha) * P + i) * A + a) * double(df[i]);
        to[(Hp == 1 ? 0 : ha) * A + a] += sum;
      }
    }
  }

  void tables(int64_t n, T* cross, T* dot, void* dcos, void* dsin) const {
    const T m = T(p_.factor), s = T(g_.sign * p_.factor);
    const int64_t P = p_.P;
    for (int64_t ha = 0; ha < p_.Ha; ++ha, cross += width_, dot += width_) {
      T* c_to = static_cast<T*>(dcos) + (n * p_.Ha + ha) * P;
      T* s_to = static_cast<T*>(dsin) + (n * p_.Ha + ha) * P;
      for (int64_t i = 0; i < P; ++i) {
        const bool pairs = p_.interleaved;
        c_to[i] = m * (pairs ? dot[2 * i] + dot[2 * i + 1] : dot[i]);
        s_to[i] = s * (pairs ? cross[2 * i + 1] - cross[2 * i] : cross[i]);
      }
    }
  }

  const RotaryArgs& p_;
  const RotaryGrads& g_;
  double* sums_;
  Angles<T> angles_;
  int64_t width_;
  T* sum_[4];  // cross and dot products; then those of k, where its tables are others
};
}  // namespace

void rotary_apply(const RotaryCpu& call, int64_t first, int64_t last, void* scratch) {
  dispatch(call.args.type, [&](auto tag) {
    using E = typename decltype(tag)::type;
    char* memory = static_cast<char*>(scratch);
    call.stream ? apply<Stream, E>(call, first, last, memory)
                : apply<Store, E>(call, first, last, memory);
  });
  if (call.stream) stream_end();
}

void rotary_grads(const RotaryCpu& call, const RotaryGrads& grads, int64_t first, int64_t last,
                  double* sums, void* scratch) {
  dispatch(call.args.type, [&](auto tag) {
    using E = typename decltype(tag)::type;
    Backward<E> backward(call, grads, sums, static_cast<char*>(scratch));
    for (int64_t n = first; n < last; ++n) backward.token(n);
  });
}
}  // namespace df::cpu::DF_ISA
