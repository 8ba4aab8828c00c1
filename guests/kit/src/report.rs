//! What was expected and what came.

use core::fmt::{self, LowerHex, Write};

use crate::{Global, boot, cpu, io, println};

static PASSED: Global<u32> = Global::new(0);
static FAILED: Global<u32> = Global::new(0);
static LAX: Global<&'static [&'static str]> = Global::new(&[]);

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

/// Whether QEMU's TCG runs this guest: our oracle, which is known to be lax here and there. Where a KVM stands in
/// between, `processor=tcg` on the command line says so.
pub fn tcg() -> bool {
    let [_, b, c, d] = cpu::cpuid(0x4000_0000, 0);
    [b, c, d] == [0x5447_4354, 0x4354_4743, 0x4743_5447] || boot::command_line().contains("processor=tcg")
}

/// Names the checks that TCG is known to fail where the manuals are clear; they do not count there.
pub fn tcg_fails(names: &'static [&'static str]) {
    if tcg() {
        LAX.set(names);
    }
}

pub fn pass(what: &str) {
    PASSED.set(PASSED.get() + 1);
    println!("{what}: ok");
}

/// One line for one thing that does not hold, with the reason.
pub fn fail(what: &str, why: fmt::Arguments) {
    if LAX.get().contains(&what) {
        println!("{what}: TCG differs, {why}");
    } else {
        FAILED.set(FAILED.get() + 1);
        println!("FAIL {what}: {why}");
    }
}

/// One line for one thing that holds or does not.
pub fn check(what: &str, holds: bool) {
    if holds { pass(what) } else { fail(what, format_args!("expected to hold")) }
}

/// One line for two values that should be equal.
pub fn eq<T: PartialEq + LowerHex>(what: &str, expected: T, got: T) {
    if expected == got {
        pass(what);
    } else {
        fail(what, format_args!("expected {expected:#x} got {got:#x}"));
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
