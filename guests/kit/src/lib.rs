//! What bare-metal guests share: the way into long mode, text and exit by the debug ports, exceptions that
//! can be provoked and looked at, page tables, the local APIC, other processors.
//!
//! *Comes in*: a multiboot 1 loader's entry. *Goes out*: lines at port E9h, an exit status at port F4h.
//!
//! Memory: the image lies at 1 MiB. Linear 0-4 GiB is mapped one to one for the supervisor, but linear
//! 1-2 GiB ([`USER`]) shows physical 0-1 GiB again, for the user too. A guest needs 64 MiB of RAM.
#![no_std]

pub mod apic;
pub mod boot;
pub mod clock;
pub mod cpu;
pub mod io;
mod memory;
pub mod page;
pub mod report;
pub mod smp;
pub mod trap;

pub use report::{check, eq, finish};
pub use trap::{Trap, catch, user};

use core::cell::UnsafeCell;

/// Distance from an address in the image to the same place as the user sees it.
pub const USER: u64 = 0x4000_0000;

/// A global that the guest reads and writes without further ado; it has one thread, or knows what it does.
pub struct Global<T>(UnsafeCell<T>);

// SAFETY: guests are single-threaded but where they synchronise by themselves.
unsafe impl<T> Sync for Global<T> {}

impl<T> Global<T> {
    pub const fn new(value: T) -> Global<T> {
        Global(UnsafeCell::new(value))
    }
    pub const fn ptr(&self) -> *mut T {
        self.0.get()
    }
    pub fn addr(&self) -> u64 {
        self.0.get() as u64
    }
}

impl<T: Copy> Global<T> {
    pub fn get(&self) -> T {
        // SAFETY: the pointer is to the cell; volatile, as handlers write it.
        unsafe { self.0.get().read_volatile() }
    }
    pub fn set(&self, value: T) {
        // SAFETY: as above.
        unsafe { self.0.get().write_volatile(value) }
    }
}

/// Defines `fn main` of a guest as the place where the kit goes after its set-up.
#[macro_export]
macro_rules! guest {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn guest_main() -> ! {
            $main();
            $crate::finish()
        }
        #[panic_handler]
        fn panic(info: &core::panic::PanicInfo) -> ! {
            $crate::println!("FAIL guest panicked: {info}");
            $crate::io::exit(1)
        }
    };
}

/// A piece of assembler as a callable `name` (argument in RDI) with one instruction that matters. Its
/// address and that of the instruction behind it are in `name_at`.
#[macro_export]
macro_rules! snippet {
    ($name:ident, $at:ident, $before:expr, $it:expr $(, $after:expr)?) => {
        core::arch::global_asm!(
            concat!(".globl ", stringify!($name)),
            concat!(stringify!($name), ":"),
            $before,
            "99:",
            $it,
            "98:",
            $($after,)?
            "ret",
            ".pushsection .rodata",
            ".balign 8",
            concat!(".globl ", stringify!($at)),
            concat!(stringify!($at), ": .quad 99b, 98b"),
            ".popsection",
        );
        unsafe extern "C" {
            fn $name(argument: u64) -> u64;
            safe static $at: [u64; 2];
        }
    };
}

#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::report::print(format_args!($($arg)*)) };
}

#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => { $crate::report::print(format_args!("{}\n", format_args!($($arg)*))) };
}
