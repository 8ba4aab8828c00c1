//! Whole machines: stock kernels, real programs, disks, debuggers, terminals, and input that is refused.
#![forbid(unsafe_code)]

mod boots;
mod control;
mod disks;
mod gdb;
mod input;
mod lockstep;
mod pauses;
mod stolen;
mod terminal;
mod tiny;
mod userland;
mod virtual_time;

/// The value, or the end of the test with the reason why it cannot run.
macro_rules! or_skip {
    ($result:expr) => {
        match $result {
            Ok(value) => value,
            Err(why) => return wardian_tests::skip(&why),
        }
    };
}
pub(crate) use or_skip;
