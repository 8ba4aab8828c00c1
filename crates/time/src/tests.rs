use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use crate::paravirt::TscScale;
use crate::{Nanos, ResumePolicy, TimeBase, TimeConfig, TimerHandler, TimerQueue, TscMode};

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

#[test]
fn guest_clocks_lag_and_catch_up_and_never_go_back() {
    let base = TimeBase::manual_with(Nanos(0), TimeConfig { may_lag: true, ..TimeConfig::default() });
    base.resume(ResumePolicy::Freeze);
    base.advance(Nanos(1000));
    assert_eq!(base.now(), Nanos(1000));
    base.advance(Nanos(500));
    let _ = base.now(); // by the machine: nobody saw it
    base.show(Nanos(1200), false);
    assert_eq!(base.lag(), Nanos(0), "forward only");
    base.show(Nanos(1200), true);
    assert_eq!((base.read(), base.timeline()), (Nanos(1200), Nanos(1500)));
    base.show(Nanos(700), true);
    assert_eq!(base.now(), Nanos(1200), "not behind what was read");
    base.advance(Nanos(100));
    assert_eq!(base.now(), Nanos(1300));
    base.show(Nanos(1600), false);
    assert_eq!((base.now(), base.lag()), (Nanos(1600), Nanos(0)));
    base.show(Nanos(9000), true);
    assert_eq!(base.now(), Nanos(1600), "never ahead of the time line");
}

#[test]
fn deadlines_in_guest_time_wait_for_clocks_that_lag() {
    let base = TimeBase::manual_with(Nanos(0), TimeConfig { may_lag: true, ..TimeConfig::default() });
    base.resume(ResumePolicy::Freeze);
    let queue = TimerQueue::new(Arc::clone(&base));
    let count = Arc::new(Count(AtomicU64::new(0)));
    let timer = queue.timer(Arc::downgrade(&count) as Weak<dyn TimerHandler>);
    base.advance(Nanos(100));
    base.show(Nanos(40), true);
    timer.arm(Nanos(50));
    assert_eq!(queue.next_deadline(), Some(Nanos(110)));
    assert_eq!(queue.run_due(), 0);
    base.advance(Nanos(10));
    assert_eq!(queue.run_due(), 1);
}

#[test]
fn tsc_modes_differ_as_stated() {
    let with = |tsc| TimeBase::manual_with(Nanos(0), TimeConfig { tsc, may_lag: false });
    let emulated = with(TscMode::Emulate);
    emulated.resume(ResumePolicy::Freeze);
    assert!(emulated.tsc() < emulated.tsc(), "each reading is higher than the one before");
    let (native, normal) = (with(TscMode::Native), with(TscMode::Default));
    for base in [&native, &normal] {
        base.resume(ResumePolicy::Freeze);
        base.advance(Nanos(10));
        base.pause();
        base.advance(Nanos(90));
        base.resume(ResumePolicy::Freeze);
        assert_eq!(base.now(), Nanos(10));
    }
    assert_eq!((native.tsc(), normal.tsc()), (100, 10));
    let clock = native.pvclock();
    assert_eq!(clock.scale.to_ns(native.tsc().wrapping_sub(clock.tsc_timestamp)), 10);
}
