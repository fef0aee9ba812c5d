//! Stamps each body of [`super::kernel`] for every instruction set and calls the one of a [`Level`].

#[cfg(target_arch = "x86_64")]
use std::any::TypeId;

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::kernel;
pub use super::kernel::{
    Band, Draw, Extent, Half, LANES, MICRO, NEAR, PANEL, PanelOf, Rounding, Sifted, TURNED, Vote, holds, join,
};
use super::level::Level;
#[cfg(target_arch = "x86_64")]
use super::level::Set;
#[cfg(target_arch = "x86_64")]
use crate::bf16::Bf16;
use crate::bf16::{Element, Work};
use crate::philox::Philox;

macro_rules! stamp {
    ($(#[$doc:meta])* $name:ident [$($p:ident : $b:path),*] ($($a:ident : $t:ty),*) $(-> $r:ty)?) => {
        $(#[$doc])*
        #[allow(unsafe_code)]
        #[inline]
        pub fn $name<$($p: $b),*>(level: Level, $($a: $t),*) $(-> $r)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
                fn avx2<$($p: $b),*>($($a: $t),*) $(-> $r)? {
                    kernel::$name::<$($p),*>($($a),*)
                }
                #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
                fn avx512<$($p: $b),*>($($a: $t),*) $(-> $r)? {
                    kernel::$name::<$($p),*>($($a),*)
                }
                match level.set() {
                    // SAFETY: a `Level` of this set exists only after every feature named above was detected.
                    Set::Avx512 => return unsafe { avx512::<$($p),*>($($a),*) },
                    // SAFETY: as above.
                    Set::Avx2 => return unsafe { avx2::<$($p),*>($($a),*) },
                    Set::Portable => {}
                }
            }
            let _ = level;
            kernel::$name::<$($p),*>($($a),*)
        }
    };
}

/// [`kernel::pick`] at a level: processors with AVX-512 move what a mask picks; on others with the instructions for bits, but without wide
/// vectors, with which compilers gather what is quicker moved one by one (twice the time).
#[allow(unsafe_code)]
#[inline]
pub fn pick<W: Work>(level: Level, into: &mut [W], bits: &[u8], x: &[W]) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "bmi1,bmi2,lzcnt,popcnt")]
        fn scalar<W: Work>(into: &mut [W], bits: &[u8], x: &[W]) -> usize {
            kernel::pick(into, bits, x, kernel::pick_word)
        }
        #[target_feature(enable = "avx512f,popcnt")]
        fn avx512<W: Work>(into: &mut [W], bits: &[u8], x: &[W]) -> usize {
            use std::arch::x86_64::{_mm512_loadu_ps, _mm512_maskz_compress_ps, _mm512_storeu_ps};
            kernel::pick(into, bits, x, |into, word, x| {
                let mut at = 0;
                for (i, x) in x.as_chunks::<16>().0.iter().enumerate() {
                    let mask = (word >> (16 * i)) as u16;
                    // SAFETY: sixteen elements of four bytes, see below.
                    let picked = _mm512_maskz_compress_ps(mask, unsafe { _mm512_loadu_ps(x.as_ptr().cast()) });
                    // SAFETY: `at` is at most 16 i, so sixteen of the 64 elements are left.
                    unsafe { _mm512_storeu_ps(into.as_mut_ptr().add(at).cast(), picked) };
                    at += mask.count_ones() as usize;
                }
                at
            })
        }
        // The only `Work` of four bytes is f32.
        if size_of::<W>() == 4 && level.set() == Set::Avx512 {
            // SAFETY: a `Level` of this set exists only after every feature named above was detected.
            return unsafe { avx512(into, bits, x) };
        }
        if level.set() != Set::Portable {
            // SAFETY: a `Level` of another set exists only after every feature named above was detected.
            return unsafe { scalar(into, bits, x) };
        }
    }
    let _ = level;
    kernel::pick(into, bits, x, kernel::pick_word)
}

/// [`kernel::flag`] at a level: processors compare into bits, and compilers do not find that (a tenth of the time).
#[allow(unsafe_code)]
#[inline]
pub fn flag<W: Work>(level: Level, bits: &mut [u8], x: &[W]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{
            _CMP_NEQ_UQ, _mm256_cmp_ps, _mm256_loadu_ps, _mm256_movemask_ps, _mm256_setzero_ps, _mm512_cmp_ps_mask,
            _mm512_loadu_ps, _mm512_setzero_ps,
        };
        #[target_feature(enable = "avx2,popcnt")]
        fn avx2<W: Work>(bits: &mut [u8], x: &[W]) -> u64 {
            kernel::flag(bits, x, |x| {
                x.as_chunks::<8>().0.iter().rev().fold(0, |word, x| {
                    // SAFETY: eight elements of four bytes, see below.
                    let x = unsafe { _mm256_loadu_ps(x.as_ptr().cast()) };
                    word << 8 | _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NEQ_UQ>(x, _mm256_setzero_ps())) as u64
                })
            })
        }
        #[target_feature(enable = "avx512f,popcnt")]
        fn avx512<W: Work>(bits: &mut [u8], x: &[W]) -> u64 {
            kernel::flag(bits, x, |x| {
                x.as_chunks::<16>().0.iter().rev().fold(0, |word, x| {
                    // SAFETY: sixteen elements of four bytes, see below.
                    let x = unsafe { _mm512_loadu_ps(x.as_ptr().cast()) };
                    word << 16 | u64::from(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(x, _mm512_setzero_ps()))
                })
            })
        }
        // The only `Work` of four bytes is f32.
        if size_of::<W>() == 4 {
            match level.set() {
                // SAFETY: a `Level` of this set exists only after every feature named above was detected.
                Set::Avx512 => return unsafe { avx512(bits, x) },
                // SAFETY: as above.
                Set::Avx2 => return unsafe { avx2(bits, x) },
                Set::Portable => {}
            }
        }
    }
    let _ = level;
    kernel::flag(bits, x, kernel::flag_word)
}

/// [`kernel::differing`] at a level, and the largest magnitude in the second tensor, as the bits of an integer: as [`flag`] and [`pick`], where
/// processors compare and move 16-bit elements.
#[allow(unsafe_code)]
#[inline]
pub fn differing(level: Level, bits: &mut [u8], into: [&mut [Half]; 2], pair: [&[Half]; 2]) -> (usize, u16) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{
            __m256i, _mm256_and_si256, _mm256_cmpeq_epi16, _mm256_loadu_si256, _mm256_max_epu16, _mm256_movemask_epi8,
            _mm256_packs_epi16, _mm256_permute4x64_epi64, _mm256_set1_epi16, _mm256_setzero_si256, _mm256_storeu_si256,
            _mm512_and_si512, _mm512_cmpneq_epi16_mask, _mm512_loadu_si512, _mm512_maskz_compress_epi16,
            _mm512_max_epu16, _mm512_set1_epi16, _mm512_setzero_si512, _mm512_storeu_si512,
        };
        #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
        fn avx2(bits: &mut [u8], into: [&mut [Half]; 2], pair: [&[Half]; 2]) -> (usize, u16) {
            let mut largest = _mm256_setzero_si256();
            let count = kernel::differing(bits, into, pair, |into, [p, n]| {
                let mut word = 0;
                for (i, (p, n)) in p.as_chunks::<32>().0.iter().zip(n.as_chunks::<32>().0).enumerate() {
                    let mut same = [_mm256_setzero_si256(); 2];
                    for (half, same) in same.iter_mut().enumerate() {
                        // SAFETY: one of two halves of sixteen elements of two bytes.
                        let load =
                            |x: &[Half; 32]| unsafe { _mm256_loadu_si256(x.as_ptr().cast::<__m256i>().add(half)) };
                        let n = load(n);
                        *same = _mm256_cmpeq_epi16(load(p), n);
                        largest = _mm256_max_epu16(largest, _mm256_and_si256(n, _mm256_set1_epi16(i16::MAX)));
                    }
                    // Halves of both are packed side by side; then quarters are put in order.
                    let packed = _mm256_packs_epi16(same[0], same[1]);
                    let same = _mm256_movemask_epi8(_mm256_permute4x64_epi64::<0b11_01_10_00>(packed)) as u32;
                    word |= u64::from(!same) << (32 * i);
                }
                kernel::pick_pair(into, [p, n], word);
                word
            });
            let mut lanes = [0u16; 16];
            // SAFETY: sixteen elements of two bytes.
            unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), largest) };
            (count, lanes.into_iter().fold(0, u16::max))
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
        fn avx512(bits: &mut [u8], into: [&mut [Half]; 2], pair: [&[Half]; 2]) -> (usize, u16) {
            let mut largest = _mm512_setzero_si512();
            let count = kernel::differing(bits, into, pair, |into, [p, n]| {
                let (mut word, mut at) = (0, 0);
                for (i, (p, n)) in p.as_chunks::<32>().0.iter().zip(n.as_chunks::<32>().0).enumerate() {
                    // SAFETY: 32 elements of two bytes each.
                    let pair =
                        unsafe { [_mm512_loadu_si512(p.as_ptr().cast()), _mm512_loadu_si512(n.as_ptr().cast())] };
                    largest = _mm512_max_epu16(largest, _mm512_and_si512(pair[1], _mm512_set1_epi16(i16::MAX)));
                    let mask = _mm512_cmpneq_epi16_mask(pair[0], pair[1]);
                    for k in 0..2 {
                        let picked = _mm512_maskz_compress_epi16(mask, pair[k]);
                        // SAFETY: `at` is at most 32, so 32 of the 64 elements are left.
                        unsafe { _mm512_storeu_si512(into[k].as_mut_ptr().add(at).cast(), picked) };
                    }
                    word |= u64::from(mask) << (32 * i);
                    at += mask.count_ones() as usize;
                }
                word
            });
            let mut lanes = [0u16; 32];
            // SAFETY: 32 elements of two bytes.
            unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), largest) };
            (count, lanes.into_iter().fold(0, u16::max))
        }
        if level.set() == Set::Avx512 && is_x86_feature_detected!("avx512vbmi2") {
            // SAFETY: a `Level` of this set exists only after every other feature named above was detected.
            return unsafe { avx512(bits, into, pair) };
        }
        if level.set() != Set::Portable {
            // SAFETY: a `Level` of another set exists only after every feature named above was detected.
            return unsafe { avx2(bits, into, pair) };
        }
    }
    let _ = level;
    let count = kernel::differing(bits, into, pair, |into, [p, n]| {
        let word = kernel::differ_word(p, n);
        kernel::pick_pair(into, [p, n], word);
        word
    });
    (count, kernel::largest_half(pair[1]))
}

stamp!(
    /// [`kernel::widen`] at a level.
    widen [E: Element, W: Work] (into: &mut [W], from: &[u8])
);
stamp!(
    /// [`kernel::scaled`] at a level.
    scaled [E: Element, W: Work] (acc: &mut [W], v: &[u8], c: W, first: bool)
);
stamp!(
    /// [`kernel::scaled_work`] at a level.
    scaled_work [W: Work] (acc: &mut [W], v: &[W], c: W, first: bool)
);
stamp!(
    /// [`kernel::difference`] at a level.
    difference [E: Element, W: Work] (acc: &mut [W], p: &[u8], n: &[u8], c: W, first: bool)
);
stamp!(
    /// [`kernel::blend`] at a level.
    blend [E: Element, W: Work] (acc: &mut [W], pair: [&[u8]; 2], base: Option<&[u8]>, c: [W; 2])
);
stamp!(
    /// [`kernel::product`] at a level.
    product [P: Work, W: Work] (acc: &mut [W], panel: PanelOf<'_, P>, width: usize, c: W, first: bool)
);
stamp!(
    /// [`kernel::subtract`] at a level.
    subtract [E: Element, W: Work] (acc: &mut [W], n: &[u8])
);
stamp!(
    /// [`kernel::finish`] at a level.
    finish [E: Element, W: Work] (out: &mut [u8], t: &[u8], u: &[W]) -> bool
);
stamp!(
    /// [`kernel::finish_as`] at a level.
    finish_as [O: Element, W: Work] (out: &mut [u8], t: &[W], u: &[W]) -> bool
);
stamp!(
    /// [`kernel::change`] at a level.
    change [O: Element, W: Work] (r: &mut [W], out: &[u8], t: &[W])
);
stamp!(
    /// [`kernel::count_lost`] at a level.
    count_lost [W: Work] (u: &[W], r: &[W]) -> (u64, u64)
);
stamp!(
    /// [`kernel::dot`] at a level.
    dot [W: Work] (a: &[W], b: &[W]) -> f64
);
stamp!(
    /// [`kernel::add_dots`] at a level.
    add_dots [W: Work] (lanes: &mut [f64; LANES], a: &[W], b: &[W])
);
stamp!(
    /// [`kernel::add_dots_double`] at a level.
    add_dots_double [W: Work] (lanes: &mut [f64; LANES], a: &[W], b: &[W])
);
stamp!(
    /// [`kernel::products`] at a level.
    products [E: Element, W: Work] (pair: [&[u8]; 2], base: Option<&[u8]>) -> [f64; 3]
);
stamp!(
    /// [`kernel::widen_largest`] at a level.
    widen_largest [E: Element, W: Work] (into: &mut [W], from: &[u8]) -> W::Magnitude
);
stamp!(
    /// [`kernel::finish_and_report`] as compilers make it.
    finish_and_report [E: Element, W: Work] (out: &mut [u8], t: &[u8], u: &[W]) -> (Rounding, bool)
);

/// [`kernel::finish_and_report`] at a level: that of bf16 by hand where there is AVX-512 (an eighth less time).
#[allow(unsafe_code)]
#[inline]
pub fn finish_report<E: Element, W: Work>(level: Level, out: &mut [u8], t: &[u8], u: &[W]) -> (Rounding, bool) {
    #[cfg(target_arch = "x86_64")]
    if TypeId::of::<(E, W)>() == TypeId::of::<(Bf16, f32)>() && level.set() == Set::Avx512 {
        // SAFETY: they are of this type.
        let single = unsafe { std::slice::from_raw_parts(u.as_ptr().cast::<f32>(), u.len()) };
        // SAFETY: a `Level` of this set exists only after every feature named there was detected.
        if let Some(report) = unsafe { avx512::finish_report_bf16(out, t, single) } {
            return (kernel::settled::<E, W>(report, out, t, u), true);
        }
    }
    finish_and_report::<E, W>(level, out, t, u)
}
stamp!(
    /// [`kernel::difference_and_report`] as compilers make it.
    difference_and_report [E: Element, W: Work] (out: &mut [u8], t: &[u8], pair: [&[u8]; 2], c: W) -> Option<Rounding>
);

/// [`kernel::difference_and_report`] at a level: as [`finish_report`].
#[allow(unsafe_code)]
#[inline]
pub fn difference_report<E: Element, W: Work>(
    level: Level,
    out: &mut [u8],
    t: &[u8],
    pair: [&[u8]; 2],
    c: W,
) -> Option<Rounding> {
    #[cfg(target_arch = "x86_64")]
    if TypeId::of::<(E, W)>() == TypeId::of::<(Bf16, f32)>() && level.set() == Set::Avx512 {
        // SAFETY: a `Level` of this set exists only after every feature named there was detected.
        let report = unsafe { avx512::difference_report_bf16(out, t, pair, c.to_f64() as f32) };
        return report.filter(kernel::all_hold::<W>);
    }
    difference_and_report::<E, W>(level, out, t, pair, c)
}
stamp!(
    /// [`kernel::extent`] at a level.
    extent [W: Work] (x: &[W]) -> Extent<W>
);
stamp!(
    /// [`kernel::extreme`] at a level.
    extreme [W: Work] (x: &[W]) -> (W, bool)
);
stamp!(
    /// [`kernel::encode`] at a level.
    encode [W: Work] (codes: &mut [u8], values: &[W], table: &[u8; 1 << 16])
);
stamp!(
    /// [`kernel::rebuilds`] at a level.
    rebuilds [E: Element, W: Work] (p: &[u8], n: &[u8], u: &[W]) -> bool
);
stamp!(
    /// [`kernel::agreement`] at a level.
    agreement [W: Work] (a: &[W], b: &[W]) -> (u64, u64)
);
stamp!(
    /// [`kernel::normal`] at a level.
    normal [W: Work] (into: &mut [W], generator: Philox, from: u64, scale: f64)
);

stamp!(
    /// [`kernel::multiply`] at a level.
    multiply [W: Work] (into: &mut [W], a: &[W], b: &[W], strides: [usize; 3], size: [usize; 3], tall: usize)
);
stamp!(
    /// [`kernel::cross`] at a level.
    cross [W: Work] (into: &mut [W], a: &[W], b: &[W], strides: [usize; 3], size: [usize; 3], tall: usize)
);
stamp!(
    /// [`kernel::turn`] at a level.
    turn [W: Work] (strip: &mut [W], from: usize, turns: &[[W; 2]])
);
stamp!(
    /// [`kernel::flip`] at a level.
    flip [W: Work] (values: &mut [W], generator: Philox, from: u64)
);
stamp!(
    /// [`kernel::less`] at a level.
    less [W: Work] (x: &mut [W], base: &[W]) -> W::Magnitude
);
stamp!(
    /// [`kernel::keep_scaled`] at a level.
    keep_scaled [W: Work] (x: &mut [W], sum: &mut [W], band: Band<W>, first: bool)
);
stamp!(
    /// [`kernel::apart`] at a level.
    apart [E: Element, W: Work] (into: &mut [W], pair: [&[u8]; 2]) -> W::Magnitude
);
stamp!(
    /// [`kernel::keep_apart`] at a level.
    keep_apart [E: Element, W: Work] (into: &mut [W], sum: &mut [W], pair: [&[u8]; 2], band: Band<W>, first: bool) -> W::Magnitude
);
stamp!(
    /// [`kernel::vote_apart`] at a level.
    vote_apart [E: Element, W: Work] (u: &mut [W], pairs: [&[u8]; 2], base: &[u8], bands: [Band<W>; 2], vote: Vote<W>) -> W::Magnitude
);
stamp!(
    /// [`kernel::vote_drawn`] at a level.
    vote_drawn [E: Element, W: Work] (u: &mut [W], pairs: [&[u8]; 2], base: &[u8], draws: [Draw<'_, W>; 2], rule: Vote<W>) -> W::Magnitude
);
stamp!(
    /// [`kernel::vote`] at a level.
    vote [W: Work] (u: &mut [W], inputs: [&[W]; 2], c: [W; 2], rule: Vote<W>)
);
stamp!(
    /// [`kernel::draw_apart`] at a level.
    draw_apart [E: Element, W: Work] (into: &mut [W], sum: &mut [W], pair: [&[u8]; 2], draw: Draw<'_, W>, first: bool) -> W::Magnitude
);
stamp!(
    /// [`kernel::count_equal_apart`] at a level.
    count_equal_apart [E: Element, W: Work] (pair: [&[u8]; 2], key: W::Magnitude) -> u64
);
stamp!(
    /// [`kernel::keep_drawn`] at a level.
    keep_drawn [W: Work] (x: &mut [W], words: &[u32], last: &[u32], share: &[W])
);
stamp!(
    /// [`kernel::keys`] at a level.
    keys [W: Work] (into: &mut [u32], x: &[W]) -> u32
);
stamp!(
    /// [`kernel::buckets`] at a level.
    buckets [] (keys: &mut [u32], some: &mut [u64], odd: &mut [u64], shift: u32, lowest: u32)
);
stamp!(
    /// [`kernel::round`] at a level.
    round [E: Element, W: Work] (x: &mut [W])
);
stamp!(
    /// [`kernel::tally`] at a level.
    tally [] (counts: &mut [u32], buckets: &[u32], some: &[u64])
);
stamp!(
    /// [`kernel::mark`] at a level.
    mark [] (counts: &mut [u32], buckets: &[u32], odd: &[u64])
);
stamp!(
    /// [`kernel::rank`] at a level.
    rank [] (ranks: &mut [u32], mixed: &mut [u32], counts: &mut [u32], buckets: &[u32], some: &[u64]) -> usize
);
stamp!(
    /// [`kernel::look_up`] at a level.
    look_up [W: Work] (lasts: &mut [u32], shares: &mut [W], ranks: &[u32], terms: &[(u32, W)], some: &[u64])
);
stamp!(
    /// [`kernel::largest`] at a level.
    largest [W: Work] (x: &[W]) -> W::Magnitude
);
stamp!(
    /// [`kernel::sift`] at a level.
    sift [W: Work] (marks: &mut [u8], x: &[W], lo: W::Magnitude, hi: W::Magnitude) -> Sifted
);
stamp!(
    /// [`kernel::sift_apart`] at a level.
    sift_apart [E: Element, W: Work] (marks: &mut [u8], pair: [&[u8]; 2], lo: W::Magnitude, hi: W::Magnitude) -> (Sifted, W::Magnitude)
);
stamp!(
    /// [`kernel::count_equal`] at a level.
    count_equal [W: Work] (x: &[W], key: W::Magnitude) -> u64
);
stamp!(
    /// [`kernel::trim`] at a level.
    trim [W: Work] (x: &mut [W], floor: W::Magnitude, ceiling: W::Magnitude)
);
stamp!(
    /// [`kernel::keep_random`] at a level.
    keep_random [W: Work] (x: &mut [W], words: &[u32], limit: u64, scale: W)
);
stamp!(
    /// [`kernel::words`] at a level.
    words [] (into: &mut [u32], generator: Philox, from: u64)
);
stamp!(
    /// [`kernel::scale`] at a level.
    scale [W: Work] (x: &mut [W], c: W)
);
stamp!(
    /// [`kernel::add`] at a level.
    add [W: Work] (acc: &mut [W], x: &[W])
);
stamp!(
    /// [`kernel::add_agreeing`] at a level.
    add_agreeing [W: Work] (acc: &mut [W], share: &mut [W], x: &[W], sign: &[W], w: W, first: bool)
);
stamp!(
    /// [`kernel::divide`] at a level.
    divide [W: Work] (acc: &mut [W], share: &[W], least: W, c: W)
);
stamp!(
    /// [`kernel::absolute`] at a level.
    absolute [W: Work] (into: &mut [W], x: &[W])
);

stamp!(
    /// [`kernel::scaled_each`] at a level.
    scaled_each [W: Work] (acc: &mut [W], v: &[W], c: &[f64], first: bool)
);
stamp!(
    /// [`kernel::add_products_each`] at a level.
    add_products_each [W: Work] (sums: &mut [f64], a: &[W], b: &[W])
);
stamp!(
    /// [`kernel::highest`] at a level.
    highest [W: Work] (x: &[W]) -> W
);
stamp!(
    /// [`kernel::add_weights`] at a level.
    add_weights [W: Work] (sums: &mut [[f64; LANES]; 3], x: &[W], y: &[W], m: [f64; 2])
);
stamp!(
    /// [`kernel::add_near_weights`] at a level.
    add_near_weights [W: Work] (sums: &mut [[f64; LANES]; 3], x: &[W], y: &[W], m: f64)
);
stamp!(
    /// [`kernel::reach`] at a level.
    reach [W: Work] (x: &[W], y: &[W]) -> (W, W::Magnitude)
);
stamp!(
    /// [`kernel::spread`] at a level.
    spread [W: Work] (into: &mut [W], inputs: &[Vec<W>], at: usize)
);
stamp!(
    /// [`kernel::count_moved`] at a level.
    count_moved [W: Work] (count: &mut [W], x: &[W], bound: W)
);
stamp!(
    /// [`kernel::count_alone`] at a level.
    count_alone [W: Work] (count: &[W], x: &[W], bound: W) -> (u64, u64)
);
stamp!(
    /// [`kernel::add_moved`] at a level.
    add_moved [W: Work] (acc: &mut [W], x: &[W], count: &[W], bound: W, factor: W)
);
stamp!(
    /// [`kernel::divide_by_count`] at a level.
    divide_by_count [W: Work] (acc: &mut [W], count: &[W])
);
stamp!(
    /// [`kernel::keep_agreeing`] at a level.
    keep_agreeing [W: Work] (x: &mut [W], sign: &[W])
);
stamp!(
    /// [`kernel::keep_where`] at a level.
    keep_where [W: Work] (x: &mut [W], other: &[W], floor: W::Magnitude)
);
stamp!(
    /// [`kernel::nearer`] at a level.
    nearer [W: Work] (u: &mut [W], a: &[W], b: &[W], t: W)
);
stamp!(
    /// [`kernel::weigh`] at a level.
    weigh [W: Work] (into: &mut [W], x: &[W], c: f64)
);
stamp!(
    /// [`kernel::multiply_panels`] at a level.
    multiply_panels [] (into: &mut [f64], a: &[f64], b: &[f64], strides: [usize; 3], size: [usize; 3], tall: usize)
);

/// The rounding report of at most MICRO elements, from the updates and what they changed. Not one body: compilers make better code of
/// the four loops apart.
pub fn rounding<W: Work>(level: Level, u: &[W], r: &[W]) -> Rounding {
    let (updated, lost) = count_lost(level, u, r);
    Rounding { intended: dot(level, u, u), realised: dot(level, r, r), dot: dot(level, u, r), updated, lost }
}

/// Calls `$body` with `$E` bound to the element type of a float format.
macro_rules! with_element {
    ($dtype:expr, $E:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::Dtype::F64 => {
                type $E = f64;
                $body
            }
            $crate::dtype::Dtype::F32 => {
                type $E = f32;
                $body
            }
            $crate::dtype::Dtype::F16 => {
                type $E = $crate::bf16::F16;
                $body
            }
            $crate::dtype::Dtype::BF16 => {
                type $E = $crate::bf16::Bf16;
                $body
            }
            other => unreachable!("arithmetic on {other}: plans admit float formats only"),
        }
    };
}
pub(crate) use with_element;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bf16::F16;
    use proptest::prelude::*;

    /// That a difference is finished at one go as it is in two steps; `tame` if that must be possible.
    fn check<E: Element, W: Work>(elements: &[[u32; 3]], c: f64, tame: bool) {
        let [p, n, t] = [0, 1, 2].map(|i| {
            let mut bytes = vec![0; elements.len() * E::SIZE];
            for (bytes, e) in bytes.chunks_exact_mut(E::SIZE).zip(elements) {
                E::narrow32(f32::from_bits(e[i])).store(bytes);
            }
            bytes
        });
        for level in Level::available() {
            let mut u = vec![W::ZERO; elements.len()];
            difference::<E, W>(level, &mut u, &p, &n, W::from_f64(c), true);
            let (mut expected, mut out) = (vec![1; t.len()], vec![2; t.len()]);
            let (in_two, finite) = finish_report::<E, W>(level, &mut expected, &t, &u);
            let found = difference_report::<E, W>(level, &mut out, &t, [&p, &n], W::from_f64(c));
            assert!(found.is_some() || !tame, "{}", level.name());
            if let Some(report) = found {
                assert!(finite && out == expected, "{}", level.name());
                let bits = |r: &Rounding| [r.intended, r.realised, r.dot].map(f64::to_bits);
                assert_eq!(bits(&report), bits(&in_two), "{}", level.name());
                assert_eq!((report.updated, report.lost), (in_two.updated, in_two.lost));
            }
        }
    }

    proptest! {
        #[test]
        fn a_difference_is_finished_as_in_two_steps(
            elements in prop::collection::vec((any::<[u32; 3]>(), prop::bool::weighted(0.2)), 0..1300),
            c in prop_oneof![Just(1.0), Just(-1.0), -3.0..3.0],
            tame in any::<bool>(),
        ) {
            // Ordinary weights, or any bits; most elements of the donors are the same.
            let ordinary = |x: u32| if tame { x & 0x807F_FFFF | (110 + (x >> 23) % 16) << 23 } else { x };
            let elements: Vec<[u32; 3]> = elements
                .into_iter()
                .map(|([p, n, t], moved)| [if moved { p } else { n }, n, t].map(ordinary))
                .collect();
            let tame = tame && c.abs() > 1e-3;
            check::<Bf16, f32>(&elements, c, tame);
            check::<F16, f32>(&elements, c, tame);
            check::<f32, f32>(&elements, c, tame);
            check::<Bf16, f64>(&elements, c, tame);
            check::<f64, f64>(&elements, c, tame);
        }
    }
}
