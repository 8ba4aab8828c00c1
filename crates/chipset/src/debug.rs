//! Ports that test guests and early boot code talk to: debug console, debug exit, POST codes.

mod persist;

use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use wardian_bus::{Access, Device};

use crate::power::{PowerRequest, PowerSink};
use crate::wire::lock;

pub use persist::{DebugConsoleState, PostState};

/// What a read of the debug console returns: how a guest tests for it (Bochs, port E9h).
pub const CONSOLE_SIGNATURE: u8 = 0xe9;

/// The debug console: every byte written to it goes to a writer.
pub struct DebugConsole {
    out: Mutex<Box<dyn Write + Send>>,
    written: AtomicU64,
    failed: AtomicU64,
}

impl DebugConsole {
    /// A console on `out`, which must not block.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> DebugConsole {
        DebugConsole { out: Mutex::new(out), written: AtomicU64::new(0), failed: AtomicU64::new(0) }
    }
}

impl Device for DebugConsole {
    fn name(&self) -> &str {
        "debug-console"
    }

    fn read(&self, _at: Access, data: &mut [u8]) {
        data.fill(CONSOLE_SIGNATURE);
    }

    fn write(&self, _at: Access, data: &[u8]) {
        // A wide OUT reaches the ports above as well; only the first byte is ours.
        let Some(byte) = data.first() else { return };
        let done = lock(&self.out).write_all(std::slice::from_ref(byte));
        let counter = if done.is_ok() { &self.written } else { &self.failed };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn inspect(&self) -> Vec<(String, String)> {
        vec![
            ("bytes_written".into(), self.written.load(Ordering::Relaxed).to_string()),
            ("bytes_failed".into(), self.failed.load(Ordering::Relaxed).to_string()),
        ]
    }
}

/// The debug-exit port: a write of `v` asks for the machine to end with status `v << 1 | 1`.
pub struct DebugExit {
    power: Arc<dyn PowerSink>,
}

impl DebugExit {
    /// A port that reports to `power`.
    #[must_use]
    pub fn new(power: Arc<dyn PowerSink>) -> DebugExit {
        DebugExit { power }
    }
}

impl Device for DebugExit {
    fn name(&self) -> &str {
        "debug-exit"
    }

    fn read(&self, _at: Access, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, at: Access, data: &[u8]) {
        if at.offset == 0 {
            let value = data.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
            self.power.request(PowerRequest::DebugExit(value));
        }
    }
}

/// The POST code port 80h: remembers the last code, which boot code also writes as a short delay.
#[derive(Debug, Default)]
pub struct PostPort {
    last: AtomicU8,
}

impl PostPort {
    /// A port that shows 0.
    #[must_use]
    pub fn new() -> PostPort {
        PostPort::default()
    }
}

impl Device for PostPort {
    fn name(&self) -> &str {
        "post"
    }

    fn read(&self, _at: Access, data: &mut [u8]) {
        data.fill(self.last.load(Ordering::Relaxed));
    }

    fn write(&self, _at: Access, data: &[u8]) {
        if let Some(code) = data.first() {
            self.last.store(*code, Ordering::Relaxed);
        }
    }

    fn inspect(&self) -> Vec<(String, String)> {
        vec![("code".into(), format!("{:#04x}", self.last.load(Ordering::Relaxed)))]
    }
}

#[cfg(test)]
mod tests {
    use super::{DebugConsole, DebugExit, PostPort};
    use crate::power::PowerRequest;
    use crate::power::tests::Requests;
    use crate::testing::{SharedBuffer, at};
    use std::sync::Arc;
    use wardian_bus::Device;

    #[test]
    fn console_shows_itself_and_passes_bytes() {
        let out = SharedBuffer::default();
        let console = DebugConsole::new(Box::new(out.clone()));
        let mut byte = [0];
        console.read(at(0), &mut byte);
        assert_eq!(byte, [0xe9]);
        console.write(at(0), b"o");
        console.write(at(0), b"k");
        assert_eq!(out.take(), b"ok");
        assert_eq!(console.inspect()[0].1, "2");
    }

    #[test]
    fn exit_takes_any_width() {
        let power = Arc::new(Requests::default());
        let port = DebugExit::new(Arc::clone(&power) as _);
        port.write(at(0), &[7]);
        port.write(at(0), &[0x34, 0x12, 0, 0]);
        port.write(at(1), &[9]);
        assert_eq!(power.take(), [PowerRequest::DebugExit(7), PowerRequest::DebugExit(0x1234)]);
    }

    #[test]
    fn post_code_reads_back() {
        let post = PostPort::new();
        post.write(at(0), &[0x42]);
        let mut byte = [0];
        post.read(at(0), &mut byte);
        assert_eq!(byte, [0x42]);
    }
}
