//! pm
