//! Which instruction set to use: the best that the processor has, or what `REASONVEC_SIMD` asks for.

use crate::{Error, Result};

/// The variable that overrides detection.
pub const VARIABLE: &str = "REASONVEC_SIMD";

/// An instruction set that this processor is known to have. Only this module makes values of it, which is what
/// lets [`super::dispatch`] call the functions compiled for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level(Set);

/// The sets that bodies are stamped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Set {
    /// The target's baseline: SSE2 on x86-64, NEON on 64-bit Arm.
    Portable,
    /// 256-bit integers and floats.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 512-bit, with byte, word and quad operations.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// Every level of this processor, the best last.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut, reason = "only x86-64 has more than the baseline")]
        let mut levels = vec![Self(Set::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("popcnt");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512cd")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 {
                levels.push(Self(Set::Avx2));
            }
            if avx512 {
                levels.push(Self(Set::Avx512));
            }
        }
        levels
    }

    /// The baseline, which every processor has.
    pub fn portable() -> Self {
        Self(Set::Portable)
    }

    /// The level to use: `REASONVEC_SIMD` if set, else the best.
    pub fn current() -> Result<Self> {
        match std::env::var(VARIABLE) {
            Ok(name) if !name.is_empty() => Self::named(&name),
            _ => Ok(Self::available().last().copied().unwrap_or(Self(Set::Portable))),
        }
    }

    /// The level of a name, if this processor has it.
    pub fn named(name: &str) -> Result<Self> {
        let levels = Self::available();
        levels.iter().copied().find(|l| l.name() == name).ok_or_else(|| {
            let names: Vec<_> = levels.iter().map(|l| l.name()).collect();
            Error::Usage(format!(
                "{VARIABLE}={name}: this processor has {}; unset it to use the best",
                names.join(", ")
            ))
        })
    }

    /// Its name, as `REASONVEC_SIMD` takes it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
    }

    /// Rows of a register tile of a product, as many as leave no sum outside the registers.
    pub fn tall(self) -> usize {
        match self.0 {
            Set::Portable => 4,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => 6,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => 12,
        }
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn set(self) -> Set {
        self.0
    }
}
