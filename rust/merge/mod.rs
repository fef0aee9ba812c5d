//! Merging: one file per family, each family one streaming schedule (design section 6).

pub mod linear;
