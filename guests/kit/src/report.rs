//! What was expected and what came.

use core::fmt::{self, LowerHex, Write};

use crate::{Global, io, println};

static PASSED: Global<u32> = Global::new(0);
static FAILED: Global<u32> = Global::new(0);

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            io::out8(io::DEBUG_CONSOLE, byte);
        }
        Ok(())
    }
}

pub fn print(text: fmt::Arguments) {
    let _ = Console.write_fmt(text);
}

/// One line for one thing that holds or does not.
pub fn check(what: &str, holds: bool) {
    if holds {
        PASSED.set(PASSED.get() + 1);
        println!("{what}: ok");
    } else {
        FAILED.set(FAILED.get() + 1);
        println!("FAIL {what}");
    }
}

/// One line for two values that should be equal.
pub fn eq<T: PartialEq + LowerHex>(what: &str, expected: T, got: T) {
    if expected == got {
        PASSED.set(PASSED.get() + 1);
        println!("{what}: ok");
    } else {
        FAILED.set(FAILED.get() + 1);
        println!("FAIL {what}: expected {expected:#x} got {got:#x}");
    }
}

/// Something that this machine does not offer.
pub fn skip(what: &str, why: &str) {
    println!("{what}: skipped, because {why}");
}

/// Ends the guest: 0 when every check held, 1 otherwise.
pub fn finish() -> ! {
    let (passed, failed) = (PASSED.get(), FAILED.get());
    println!("{passed} ok, {failed} failed");
    io::exit(u32::from(failed > 0))
}
