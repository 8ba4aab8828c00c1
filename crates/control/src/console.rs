//! The machine's terminal: what it printed, kept for those who come, and passed on to those who watch.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::broadcast;

/// Bytes of the past that are kept.
pub(crate) const SCROLLBACK: usize = 64 << 10;
/// Bytes of one piece.
const PIECE: usize = 4096;
/// Pieces that a viewer may be behind.
const BEHIND: usize = 256;

/// The screen that all viewers share.
pub(crate) struct Hub(Mutex<Inner>);

struct Inner {
    past: VecDeque<u8>,
    sender: broadcast::Sender<Bytes>,
}

impl Default for Hub {
    fn default() -> Hub {
        Hub(Mutex::new(Inner { past: VecDeque::new(), sender: broadcast::Sender::new(BEHIND) }))
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest printed this. Never waits for a viewer.
    pub(crate) fn show(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        let tail = &bytes[bytes.len().saturating_sub(SCROLLBACK)..];
        let over = (inner.past.len() + tail.len()).saturating_sub(SCROLLBACK);
        inner.past.drain(..over);
        inner.past.extend(tail);
        for piece in bytes.chunks(PIECE) {
            if inner.sender.receiver_count() > 0 {
                let _ = inner.sender.send(Bytes::copy_from_slice(piece));
            }
        }
    }

    /// The last `most` bytes, and what comes from now on.
    pub(crate) fn watch(&self, most: usize) -> (Bytes, broadcast::Receiver<Bytes>) {
        let inner = self.lock();
        let skip = inner.past.len().saturating_sub(most);
        (inner.past.iter().skip(skip).copied().collect(), inner.sender.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::{Hub, SCROLLBACK};
    use tokio::sync::broadcast::error::TryRecvError;

    #[test]
    fn viewers_see_the_past_and_each_byte_after_it() {
        let hub = Hub::default();
        hub.show(b"login: ");
        let (past, mut one) = hub.watch(4);
        assert_eq!(past, "in: ");
        hub.show(b"root");
        let (past, mut two) = hub.watch(usize::MAX);
        assert_eq!(past, "login: root");
        hub.show(b"!");
        assert_eq!((one.try_recv().unwrap(), one.try_recv().unwrap()), ("root".into(), "!".into()));
        assert_eq!(two.try_recv().unwrap(), "!");
    }

    #[test]
    fn the_past_and_slow_viewers_are_bounded() {
        let hub = Hub::default();
        let (_, mut slow) = hub.watch(0);
        hub.show(&vec![b'a'; SCROLLBACK * 3]);
        hub.show(b"b");
        let (past, _) = hub.watch(usize::MAX);
        assert!(past.len() == SCROLLBACK && past.ends_with(b"ab"));
        for _ in 0..300 {
            hub.show(&[b'c'; 9000]);
        }
        assert!(matches!(slow.try_recv(), Err(TryRecvError::Lagged(_))));
        assert_eq!(hub.watch(usize::MAX).0.len(), SCROLLBACK);
    }
}
