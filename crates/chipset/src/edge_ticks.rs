//! Timers whose ticks are edges on an interrupt line: PIT channel 0 and the edge-triggered HPET timers.

use wardian_irq::{Delivery, Due, Gsi, TickLink, TickPort};
use wardian_state::check::{Wrong, at_most};
use wardian_time::{Tick, TimeBase};

/// A tick, its way to the interrupt chip, and its deadline in the timer queue.
pub(crate) trait EdgeTicks {
    /// The way to the chip.
    fn port(&self) -> &TickPort;
    /// The machine's time.
    fn base(&self) -> &TimeBase;
    /// Changes the tick under the device's lock, then arms the queue for it. The second value names the
    /// input that it drives now, if it drives one.
    fn with_tick<R>(&self, change: impl FnOnce(&mut Tick) -> R) -> (R, Option<Gsi>);

    /// Offers what is due until nothing is, or the guest has to take it first.
    fn offer_ticks(&self, slept: bool) {
        loop {
            let now = self.base().moment();
            let ((offered, apparent), gsi) = self.with_tick(|tick| (tick.offer(now, slept), tick.apparent()));
            if !offered {
                return;
            }
            if let Some((at, back)) = apparent {
                self.base().show(at, back);
            }
            let delivery = gsi.map_or(Delivery::Masked, |gsi| self.port().edge(gsi));
            let waits = self.port().tells_taken();
            self.with_tick(|tick| match delivery {
                Delivery::Masked => {
                    tick.refuse();
                    if !waits || gsi.is_none() {
                        tick.unmask(now.line); // nobody will say when that changes
                    }
                }
                Delivery::Coalesced => tick.coalesced(),
                Delivery::Accepted if waits => {}
                Delivery::Accepted => tick.taken(now),
            });
            if delivery != Delivery::Accepted || waits {
                return;
            }
        }
    }

    /// Takes up the tick where it was when it was saved, before the vCPUs run. Where the chip does not say what
    /// the guest takes, what was raised counts as taken: it waits in a local APIC or PIC.
    fn restore_link(&self, link: TickLink) {
        self.port().set_link(link);
        if self.port().tells_taken() {
            if link.due == Due::No {
                self.with_tick(|_| ());
            } // otherwise the deadline is over, and the vCPU arms the next one when it looks
            return;
        }
        let now = self.base().timeline();
        self.with_tick(|tick| {
            tick.taken(now);
            tick.unmask(now);
        });
    }

    /// The guest took the interrupt.
    fn tick_taken(&self) {
        let now = self.base().moment();
        self.with_tick(|tick| tick.taken(now));
        self.offer_ticks(false);
    }

    /// The guest may have unmasked the interrupt.
    fn tick_unmasked(&self) {
        let now = self.base().timeline();
        self.with_tick(|tick| tick.unmask(now));
        self.offer_ticks(true);
    }
}

/// Whether a chip can be that far with a tick.
pub(crate) fn check_link(link: &TickLink) -> Result<(), Wrong> {
    let isa = link.awaited.and_then(|awaited| awaited.isa);
    at_most("link.awaited.isa", isa.unwrap_or(0), 15u8)
}

/// What happened to a tick, as named values for `inspect`.
pub(crate) fn tick_values(prefix: &str, tick: &Tick) -> Vec<(String, String)> {
    let counts = tick.counts();
    [
        ("policy", tick.config().policy.to_string()),
        ("delivered", counts.delivered.to_string()),
        ("replayed", counts.replayed.to_string()),
        ("missed", counts.missed.to_string()),
        ("masked", counts.masked.to_string()),
        ("coalesced", counts.coalesced.to_string()),
        ("stepped", counts.stepped.to_string()),
        ("backlog", tick.backlog().to_string()),
        ("latest_ns", counts.latest.0.to_string()),
    ]
    .map(|(name, value)| (format!("{prefix}/{name}"), value))
    .to_vec()
}
