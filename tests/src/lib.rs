//! Whole machines: what starts the built `wardian`, watches it and gives it up when it takes too long.
//!
//! *Comes in*: a command line for `wardian run`, and what to wait for. *Goes out*: status, serial log, messages.
//! The tests are in `whole/`; the program is `$WARDIAN_BIN`, or built once.
//!
//! **Architecture Invariant:** every machine has a time limit, and none outlives its test. **Architecture
//! Invariant:** a test that fails shows the whole serial log. **Architecture Invariant:** a test that cannot
//! run says "skipped, because …", and fails if `$WARDIAN_TESTS` is `all`.
//!
//! **API Boundary:** [`Run`], [`Running`], [`Ended`], [`Debian`], [`tiny`], [`skip`].
#![forbid(unsafe_code)]

mod guest;
mod log;
mod program;
mod run;

pub use guest::{Debian, Kernel, section, tiny, well_ended};
pub use log::{Finding, findings};
pub use program::{has, output, skip, wardian};
pub use run::{Ended, Run, Running};
