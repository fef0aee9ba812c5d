//! Counter-based random numbers: `value = f(seed, tensor name, index)`.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) needs no state, so any block of any tensor
//! can be made by any thread. The normal deviates use polynomials of this file and not the platform's libm, whose
//! last bits differ from one system to the next; `reasonvec.reference` makes the same bits.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// One round of splitmix64: spreads a 64-bit number over all 64 bits.
pub fn splitmix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3))
}

/// The generator of one tensor: a key made of the seed, the tensor's name and the purpose.
#[derive(Debug, Clone, Copy)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    /// The generator for a tensor; `stream` keeps different uses of one seed apart.
    pub fn new(seed: u64, name: &str, stream: u64) -> Self {
        let key = splitmix64(fnv1a64(name.as_bytes()) ^ splitmix64(seed) ^ splitmix64(stream ^ 0x5265_6173_5665_6300));
        Self { key: [key as u32, (key >> 32) as u32] }
    }

    /// The four words at a counter.
    #[inline(always)]
    pub fn words(self, counter: u64) -> [u32; 4] {
        let mut x = [counter as u32, (counter >> 32) as u32, 0, 0];
        let mut key = self.key;
        for _ in 0..10 {
            let a = u64::from(MULTIPLIERS[0]) * u64::from(x[0]);
            let b = u64::from(MULTIPLIERS[1]) * u64::from(x[2]);
            x = [(b >> 32) as u32 ^ x[1] ^ key[0], b as u32, (a >> 32) as u32 ^ x[3] ^ key[1], a as u32];
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        x
    }

    /// [`Philox::words`] at counters in a row. Words stand in the lower halves of 64-bit lanes, whatever is above them: what multipliers take without
    /// moving anything, so that compilers make many counters go through the rounds side by side.
    #[inline(always)]
    pub fn words_from(self, counter: u64, into: &mut [[u32; 4]]) {
        const LOW: u64 = 0xFFFF_FFFF;
        for (j, four) in into.iter_mut().enumerate() {
            let counter = counter.wrapping_add(j as u64);
            let mut x = [counter, counter >> 32, 0, 0];
            let mut key = self.key;
            for _ in 0..10 {
                let a = u64::from(MULTIPLIERS[0]) * (x[0] & LOW);
                let b = u64::from(MULTIPLIERS[1]) * (x[2] & LOW);
                x = [(b >> 32) ^ x[1] ^ u64::from(key[0]), b, (a >> 32) ^ x[3] ^ u64::from(key[1]), a];
                key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
            }
            *four = x.map(|word| word as u32);
        }
    }

    /// Standard normal deviates `2j` and `2j + 1` (Box-Muller).
    #[inline(always)]
    pub fn normal_pair(self, j: u64) -> [f64; 2] {
        let x = self.words(j);
        let step = f64::from_bits((1023 - 52) << 52);
        let u1 = ((((u64::from(x[0])) << 20) | (u64::from(x[1]) >> 12)) as f64 + 0.5) * step;
        let u2 = (((u64::from(x[2])) << 20) | (u64::from(x[3]) >> 12)) as f64 * step;
        let radius = (-2.0 * ln(u1)).sqrt();
        let (cos, sin) = cos_sin_turns(u2);
        [radius * cos, radius * sin]
    }

    /// A permutation of `0..into.len()` by Fisher-Yates.
    pub fn permutation(self, into: &mut [u32]) {
        for (i, slot) in into.iter_mut().enumerate() {
            *slot = i as u32;
        }
        let mut words = [0u32; 4];
        for (drawn, i) in (1..into.len()).rev().enumerate() {
            if drawn % 4 == 0 {
                words = self.words((drawn / 4) as u64);
            }
            let j = (u64::from(words[drawn % 4]) * (i as u64 + 1)) >> 32;
            into.swap(i, j as usize);
        }
    }
}

/// Natural logarithm of a positive normal number, by the series of 2 artanh((m - 1) / (m + 1)).
#[inline(always)]
pub fn ln(u: f64) -> f64 {
    let bits = u.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut m = f64::from_bits((bits & 0x000F_FFFF_FFFF_FFFF) | (1023 << 52));
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        exponent += 1;
    }
    let s = (m - 1.0) / (m + 1.0);
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * artanh_series(s)
}

/// `ln(1 + v)` for a small number, which may be less than what 1 can keep of it.
pub fn ln_1p(v: f64) -> f64 {
    let s = v / (2.0 + v);
    2.0 * s * artanh_series(s)
}

/// `artanh(s) / s` for magnitudes up to 0.172.
#[inline(always)]
fn artanh_series(s: f64) -> f64 {
    let z = s * s;
    let mut p = 1.0 / 19.0;
    for k in [17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        p = p * z + 1.0 / k;
    }
    p
}

const SIN: [f64; 8] = [
    -1.0 / 1_307_674_368_000.0,
    1.0 / 6_227_020_800.0,
    -1.0 / 39_916_800.0,
    1.0 / 362_880.0,
    -1.0 / 5_040.0,
    1.0 / 120.0,
    -1.0 / 6.0,
    1.0,
];
const COS: [f64; 9] = [
    1.0 / 20_922_789_888_000.0,
    -1.0 / 87_178_291_200.0,
    1.0 / 479_001_600.0,
    -1.0 / 3_628_800.0,
    1.0 / 40_320.0,
    -1.0 / 720.0,
    1.0 / 24.0,
    -1.0 / 2.0,
    1.0,
];

/// Cosine and sine of `2 pi u` for `u` in `[0, 1)`, by Taylor polynomials on an eighth of a turn.
#[inline(always)]
fn cos_sin_turns(u: f64) -> (f64, f64) {
    let x = 4.0 * u;
    let k = (x + 0.5).floor();
    let th = (x - k) * std::f64::consts::FRAC_PI_2;
    let z = th * th;
    let horner = |c: &[f64]| c[1..].iter().fold(c[0], |p, &c| p * z + c);
    let s = th * horner(&SIN);
    let c = horner(&COS);
    match k as i64 & 3 {
        0 => (c, s),
        1 => (-s, c),
        2 => (-c, -s),
        _ => (s, -c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        let zero = Philox { key: [0, 0] };
        assert_eq!(zero.words(0), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
    }

    #[test]
    fn counters_side_by_side_give_the_same_words() {
        let generator = Philox::new(3, "a", 1);
        for from in [0, 5, u64::from(u32::MAX) - 3] {
            let mut many = [[0; 4]; 37];
            generator.words_from(from, &mut many);
            assert!((0..37).all(|j| many[j as usize] == generator.words(from + j)));
        }
    }

    #[test]
    fn polynomials_agree_with_libm() {
        for i in 1..100_000u32 {
            let u = f64::from(i) / 100_000.0;
            assert!((ln(u) - u.ln()).abs() < 1e-12 * (1.0 + u.ln().abs()));
            let (c, s) = cos_sin_turns(u);
            let angle = 2.0 * std::f64::consts::PI * u;
            assert!((c - angle.cos()).abs() < 1e-11 && (s - angle.sin()).abs() < 1e-11);
        }
    }

    #[test]
    fn normals_have_the_moments_of_normals() {
        let g = Philox::new(7, "a", 1);
        let z: Vec<f64> = (0..50_000).flat_map(|j| g.normal_pair(j)).collect();
        let n = z.len() as f64;
        let moment = |k: i32| z.iter().map(|x| x.powi(k)).sum::<f64>() / n;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.02 && (moment(4) - 3.0).abs() < 0.12);
    }

    #[test]
    fn permutations_are_permutations() {
        let mut p = vec![0u32; 1000];
        Philox::new(1, "x", 2).permutation(&mut p);
        let mut sorted = p.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().enumerate().all(|(i, &v)| v == i as u32));
        assert_ne!(p, sorted);
    }
}
