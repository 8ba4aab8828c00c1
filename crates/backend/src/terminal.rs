//! The user's terminal as the guest's: raw mode, the escape, and the way back.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};

use crate::{LoopHandle, Next};

/// The key that begins an escape: Ctrl-a.
const ESCAPE: u8 = 0x01;

/// Typed bytes kept for a guest that does not take them.
const KEPT: usize = 64 << 10;

/// Takes typed bytes for the guest; returns how many it had room for. The rest is offered again.
pub type InputSink = Box<dyn FnMut(&[u8]) -> usize + Send>;

/// A terminal that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TerminalError {
    /// It is one, but its modes cannot be read or set.
    #[error("Could not put the terminal into raw mode")]
    Mode(#[source] io::Error),
}

/// Modes before raw mode; set once.
static SAVED: OnceLock<Termios> = OnceLock::new();
/// Whether standard input is in raw mode because of us.
static RAW: AtomicBool = AtomicBool::new(false);

/// Puts the terminal back as it was before raw mode. May be called at any time, from any thread, from a
/// signal handler and twice; does nothing if there is nothing to put back.
pub fn restore() {
    if RAW.swap(false, Ordering::AcqRel)
        && let Some(saved) = SAVED.get()
    {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, saved);
    }
}

fn set_raw() -> Result<(), TerminalError> {
    let stdin = rustix::stdio::stdin();
    let now = match tcgetattr(stdin) {
        Ok(now) => now,
        Err(Errno::NOTTY | Errno::INVAL | Errno::BADF) => return Ok(()),
        Err(error) => return Err(TerminalError::Mode(error.into())),
    };
    let mut raw = SAVED.get_or_init(|| now).clone();
    raw.make_raw();
    // The host's own lines end in a bare newline.
    raw.output_modes |= OutputModes::OPOST;
    hook_panics();
    crate::signals::install();
    RAW.store(true, Ordering::Release);
    tcsetattr(stdin, OptionalActions::Now, &raw).map_err(|error| {
        restore();
        TerminalError::Mode(error.into())
    })
}

fn hook_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            before(info);
        }));
    });
}

/// Finds the escape in what is typed: Ctrl-a x quits, Ctrl-a Ctrl-a is one Ctrl-a, Ctrl-a and any other
/// key is dropped.
#[derive(Debug, Default)]
struct Escape {
    begun: bool,
}

impl Escape {
    /// Appends what is for the guest to `out`; says whether the user wants out.
    fn feed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> bool {
        for byte in bytes {
            match (self.begun, *byte) {
                (false, ESCAPE) => self.begun = true,
                (false, byte) => out.push(byte),
                (true, byte) => {
                    self.begun = false;
                    match byte {
                        b'x' | b'X' => return true,
                        ESCAPE => out.push(ESCAPE),
                        _ => {}
                    }
                }
            }
        }
        false
    }
}

/// Standard input given to the guest. While it lives, a terminal is in raw mode; dropping it, a panic in
/// any thread, and a signal that ends the process put it back.
#[derive(Debug)]
#[must_use = "dropping it ends raw mode"]
pub struct Terminal(());

impl Terminal {
    /// Reads standard input on the event loop and offers it to `sink`; Ctrl-a x calls `quit` instead and
    /// ends the reading. If it is no terminal it is read all the same, and its end is just the end of
    /// input.
    ///
    /// # Errors
    /// When it is a terminal that cannot be put into raw mode.
    pub fn attach(
        events: &LoopHandle,
        sink: InputSink,
        quit: impl FnMut() + Send + 'static,
    ) -> Result<Terminal, TerminalError> {
        set_raw()?;
        events.add(io::stdin(), input_handler(io::stdin(), sink, quit));
        Ok(Terminal(()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

/// The event loop's handler for a descriptor with typed bytes.
fn input_handler(
    fd: impl AsFd + Send + 'static,
    mut sink: InputSink,
    mut quit: impl FnMut() + Send + 'static,
) -> impl FnMut() -> Next + Send + 'static {
    let mut escape = Escape::default();
    let mut waiting = Vec::new();
    let mut ended = false;
    move || {
        // What the guest does not take yet is kept, up to a bound, and the reading goes on behind it: the escape
        // must be found even when the guest hangs.
        if !ended && (waiting.is_empty() || waiting.len() < KEPT && readable(&fd)) {
            let mut bytes = [0; 1024];
            match rustix::io::read(&fd, &mut bytes) {
                Ok(0) => ended = true,
                Ok(n) => {
                    if escape.feed(&bytes[..n], &mut waiting) {
                        quit();
                        return Next::Remove;
                    }
                }
                Err(Errno::INTR | Errno::AGAIN) if waiting.is_empty() => return Next::Keep,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => {
                    tracing::debug!("Standard input ends: {error}");
                    ended = true;
                }
            }
        }
        let taken = sink(&waiting).min(waiting.len());
        waiting.drain(..taken);
        match (waiting.is_empty(), ended) {
            (true, true) => Next::Remove,
            (true, false) => Next::Keep,
            (false, _) => Next::Later,
        }
    }
}

/// Whether a read would return at once.
fn readable(fd: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::sync::{Arc, Mutex};

    use super::{Escape, input_handler};
    use crate::{EventLoop, Next};

    #[test]
    fn escape_sequences() {
        type Row = (&'static [&'static [u8]], &'static [u8], bool);
        let table: [Row; 6] = [
            (&[b"ls\r"], b"ls\r", false),
            (&[b"a\x01", b"x", b"never"], b"a", true),
            (&[b"\x01\x01x"], b"\x01x", false),
            (&[b"\x01\x01\x01x"], b"\x01", true),
            (&[b"\x01qx"], b"x", false),
            (&[b"\x03\x1a\x1c"], b"\x03\x1a\x1c", false),
        ];
        for (input, guest, quits) in table {
            let (mut escape, mut out) = (Escape::default(), Vec::new());
            let quit = input.iter().any(|bytes| escape.feed(bytes, &mut out));
            assert_eq!((out.as_slice(), quit), (guest, quits), "{input:?}");
        }
    }

    #[test]
    fn escape_is_found_behind_input_that_the_guest_does_not_take() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let quits = Arc::new(Mutex::new(0));
        let of_quit = Arc::clone(&quits);
        let mut handler = input_handler(read, Box::new(|_| 0), move || *of_quit.lock().unwrap() += 1);
        rustix::io::write(&write, &[b'y'; 3000]).unwrap();
        assert_eq!(handler(), Next::Later);
        rustix::io::write(&write, b"\x01x").unwrap();
        assert!((0..10).any(|_| handler() == Next::Remove));
        assert_eq!(*quits.lock().unwrap(), 1);
    }

    #[test]
    fn end_of_a_pipe_is_not_quit_and_a_full_guest_loses_nothing() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let read = Arc::new(read);
        let got = Arc::new(Mutex::new(Vec::new()));
        let (of_sink, quits) = (Arc::clone(&got), Arc::new(Mutex::new(0)));
        let of_quit = Arc::clone(&quits);
        let sink = Box::new(move |bytes: &[u8]| {
            let taken = bytes.len().min(3);
            of_sink.lock().unwrap().extend_from_slice(&bytes[..taken]);
            taken
        });
        let mut handler = input_handler(Arc::clone(&read), sink, move || *of_quit.lock().unwrap() += 1);
        let (send, receive) = mpsc::channel();
        let events = EventLoop::start().unwrap();
        events.handle().add(read, move || {
            let next = handler();
            if next == Next::Remove {
                send.send(()).unwrap();
            }
            next
        });
        rustix::io::write(&write, b"0123456789").unwrap();
        drop(write);
        receive.recv().unwrap();
        assert_eq!(*got.lock().unwrap(), b"0123456789");
        assert_eq!(*quits.lock().unwrap(), 0);
    }
}
