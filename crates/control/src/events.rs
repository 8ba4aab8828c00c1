//! What happened, kept for those who ask and passed on to those who listen.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::broadcast;

/// Bytes of past events that are kept.
const KEPT: usize = 1 << 20;
/// Events that a listener may be behind.
const BEHIND: usize = 64;

/// The ring of events, each a line of JSON.
pub(crate) struct EventLog(Mutex<Inner>);

struct Inner {
    past: VecDeque<Bytes>,
    size: usize,
    sender: broadcast::Sender<Bytes>,
}

impl Default for EventLog {
    fn default() -> EventLog {
        let sender = broadcast::Sender::new(BEHIND);
        EventLog(Mutex::new(Inner { past: VecDeque::new(), size: 0, sender }))
    }
}

impl EventLog {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more line. Never waits for a listener.
    pub(crate) fn push(&self, line: Bytes) {
        let mut inner = self.lock();
        inner.size += line.len();
        inner.past.push_back(line.clone());
        while inner.size > KEPT {
            let Some(old) = inner.past.pop_front() else { break };
            inner.size -= old.len();
        }
        // Nobody may be listening.
        let _ = inner.sender.send(line);
    }

    /// The last `most` lines, and what comes from now on: nothing between them is missed or told twice.
    pub(crate) fn listen(&self, most: usize) -> (Vec<Bytes>, broadcast::Receiver<Bytes>) {
        let inner = self.lock();
        let skip = inner.past.len().saturating_sub(most);
        (inner.past.iter().skip(skip).cloned().collect(), inner.sender.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::{EventLog, KEPT};
    use bytes::Bytes;
    use tokio::sync::broadcast::error::TryRecvError;

    #[test]
    fn the_past_and_the_future_meet_and_both_are_bounded() {
        let log = EventLog::default();
        log.push(Bytes::from_static(b"1\n"));
        log.push(Bytes::from_static(b"2\n"));
        let (past, mut future) = log.listen(1);
        assert_eq!(past, ["2\n"]);
        log.push(Bytes::from_static(b"3\n"));
        assert_eq!(future.try_recv().unwrap(), "3\n");
        assert_eq!(log.listen(usize::MAX).0.len(), 3);
        for _ in 0..1000 {
            log.push(Bytes::from(vec![b'x'; 10_000]));
        }
        assert!(matches!(future.try_recv(), Err(TryRecvError::Lagged(_))));
        assert_eq!(log.listen(usize::MAX).0.len(), KEPT / 10_000);
        log.push(Bytes::from(vec![0; KEPT + 1]));
        assert!(log.listen(usize::MAX).0.is_empty(), "one that is larger than all is not kept");
    }
}
