//! Element formats of safetensors: names, sizes, and which of them carry arithmetic.

use std::fmt;

/// An element format, by its safetensors name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
    C64,
    F8E4M3,
    F8E5M2,
    F8E8M0,
}

/// What may be done with a format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Added, scaled, rounded.
    Float,
    /// Copied when equal in every input: integers and booleans.
    Exact,
    /// Recognised and refused: codes that mean nothing without their scales, and complex numbers.
    Refused,
}

const NAMES: [(&str, Dtype); 17] = [
    ("F64", Dtype::F64),
    ("F32", Dtype::F32),
    ("F16", Dtype::F16),
    ("BF16", Dtype::BF16),
    ("I64", Dtype::I64),
    ("I32", Dtype::I32),
    ("I16", Dtype::I16),
    ("I8", Dtype::I8),
    ("U64", Dtype::U64),
    ("U32", Dtype::U32),
    ("U16", Dtype::U16),
    ("U8", Dtype::U8),
    ("BOOL", Dtype::Bool),
    ("C64", Dtype::C64),
    ("F8_E4M3", Dtype::F8E4M3),
    ("F8_E5M2", Dtype::F8E5M2),
    ("F8_E8M0", Dtype::F8E8M0),
];

impl Dtype {
    /// The format of a safetensors name, if it is one that this library knows.
    pub fn parse(name: &str) -> Option<Self> {
        NAMES.iter().find(|(n, _)| *n == name).map(|&(_, d)| d)
    }

    /// The safetensors name.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|&&(_, d)| d == self).map_or("?", |&(n, _)| n)
    }

    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 | Self::C64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::I8 | Self::U8 | Self::Bool | Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 => 1,
        }
    }

    /// What may be done with it.
    pub const fn class(self) -> Class {
        match self {
            Self::F64 | Self::F32 | Self::F16 | Self::BF16 => Class::Float,
            Self::C64 | Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 => Class::Refused,
            _ => Class::Exact,
        }
    }

    /// Whether arithmetic is defined on it.
    pub const fn is_float(self) -> bool {
        matches!(self.class(), Class::Float)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for (name, dtype) in NAMES {
            assert_eq!(Dtype::parse(name), Some(dtype));
            assert_eq!(dtype.name(), name);
        }
        assert_eq!(Dtype::parse("F4"), None);
    }
}
