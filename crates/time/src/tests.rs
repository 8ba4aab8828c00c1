use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use crate::paravirt::TscScale;
use crate::{Nanos, ResumePolicy, Tick, TimeBase, TimerHandler, TimerQueue};

#[test]
fn scale_is_exact_to_a_part_per_billion() {
    for hz in [1_000_000u64, 1_000_000_000, 2_600_000_000, 5_250_000_000, 999_999_999] {
        let scale = TscScale::for_hz(hz);
        let ns = scale.to_ns(hz * 1000);
        assert!(ns.abs_diff(1_000_000_000_000) < 2000, "{hz} Hz: {ns}");
    }
}

#[test]
fn a_paused_base_stands_still_and_goes_on_where_it_stopped() {
    let base = TimeBase::manual(Nanos(0));
    base.advance(Nanos(500));
    assert_eq!(base.now(), Nanos(0));
    base.resume(ResumePolicy::Freeze);
    base.advance(Nanos(100));
    assert_eq!(base.now(), Nanos(100));
    base.pause();
    base.advance(Nanos(1000));
    assert_eq!(base.now(), Nanos(100));
    base.resume(ResumePolicy::Step(Nanos(7)));
    assert_eq!(base.now(), Nanos(107));
}

#[test]
fn a_late_tick_comes_once_and_returns_to_its_grid() {
    let mut tick = Tick::stopped();
    tick.start_periodic(Nanos(10), Nanos(10));
    assert!(!tick.take_due(Nanos(9)));
    assert!(tick.take_due(Nanos(10)));
    assert!(tick.take_due(Nanos(47)));
    assert_eq!(tick.deadline(), Some(Nanos(50)));
    assert_eq!(tick.counts(), (2, 2));
    tick.start_once(Nanos(60));
    assert!(tick.take_due(Nanos(61)));
    assert_eq!(tick.deadline(), None);
}

struct Count(AtomicU64);
impl TimerHandler for Count {
    fn expired(&self, _now: Nanos) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn the_queue_fires_in_order_and_once() {
    let base = TimeBase::manual(Nanos(0));
    base.resume(ResumePolicy::Freeze);
    let queue = TimerQueue::new(Arc::clone(&base));
    let count = Arc::new(Count(AtomicU64::new(0)));
    let weak: Weak<dyn TimerHandler> = Arc::downgrade(&count) as Weak<dyn TimerHandler>;
    let (a, b) = (queue.timer(weak.clone()), queue.timer(weak));
    a.arm(Nanos(5));
    b.arm(Nanos(9));
    b.disarm();
    base.advance(Nanos(20));
    assert_eq!(queue.run_due(), 1);
    assert_eq!(queue.next_deadline(), None);
}
