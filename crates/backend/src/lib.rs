//! The host's side of devices: disk images, the terminal, output files, the event loop, randomness.
//!
//! *Comes in*: paths, descriptors, guest memory slices to fill or to store. *Goes out*: bytes on the host,
//! and calls into closures that the machine has registered.
//!
//! **Architecture Invariant:** only worker threads and the event loop wait for the host; what a vCPU thread
//! calls here ([`Output`], [`Event::signal`]) does not, or not for longer than a bounded moment.
//! **Architecture Invariant:** what the guest wrote into a disk never decides how Wardian opens it, unless
//! the user left the format open; and then a guest cannot turn a raw disk into something else.
//! **Architecture Invariant:** unsafe code stays in `sys` and `signals`: thin wrappers of host calls.
//!
//! **API Boundary:** [`Disk`], [`EventLoop`], [`Event`], [`Terminal`], [`Output`], [`entropy`].

pub mod disk;
mod event;
mod output;
mod signals;
mod sys;
mod terminal;

pub use disk::{Disk, DiskError, DiskOptions, Format};
pub use event::{Event, EventLoop, LoopHandle, Next};
pub use output::Output;
pub use signals::{on_pause, on_terminate};
pub use terminal::{InputSink, Terminal, TerminalError, restore as restore_terminal};

/// Fills `out` with random bytes from the host's kernel.
///
/// # Errors
/// When the host refuses (before its pool is ready on very old kernels).
pub fn entropy(out: &mut [u8]) -> std::io::Result<()> {
    let mut at = 0;
    while at < out.len() {
        match rustix::rand::getrandom(&mut out[at..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => at += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn entropy_fills_everything_and_differs() {
        let mut all = [[0u8; 600]; 2];
        for one in &mut all {
            super::entropy(one).unwrap();
            assert!(one[500..].iter().any(|byte| *byte != 0));
        }
        assert_ne!(all[0], all[1]);
    }
}
