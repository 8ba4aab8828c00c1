//! Counters in the text format of Prometheus (OpenMetrics 1.0).

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use wardian_machine::{Stats, Status};

use crate::reply::{Fault, Reply, plain};
use crate::server::Host;

/// What the counters were at one moment.
#[derive(Debug)]
struct Scrape {
    stats: Stats,
    status: Status,
    memory: u64,
    /// Resident memory of the process in bytes.
    resident: Option<u64>,
}

/// Values of one metric, by label.
type Rows<V> = Vec<(Vec<(&'static str, String)>, V)>;

const SECOND: f64 = 1e9;

impl Scrape {
    /// One row for each vCPU and what it lists.
    fn by_vcpu<V>(
        &self,
        list: impl Fn(&wardian_machine::VcpuStats) -> Vec<(&'static str, String, V)>,
    ) -> Rows<V> {
        let rows = self.stats.vcpus.iter().flat_map(|vcpu| {
            let all = list(vcpu).into_iter();
            all.map(|(label, name, value)| (vec![("vcpu", vcpu.vcpu.to_string()), (label, name)], value))
        });
        rows.collect()
    }

    fn timers(&self, counters: &[&str]) -> Rows<u64> {
        let of_timer = |(timer, all): (&String, &std::collections::BTreeMap<String, u64>)| {
            let row = |(name, value): (&String, &u64)| {
                counters
                    .contains(&name.as_str())
                    .then(|| (vec![("timer", timer.clone()), ("fate", name.clone())], *value))
            };
            all.iter().filter_map(row).collect::<Vec<_>>()
        };
        self.stats.timers.iter().flat_map(of_timer).collect()
    }
}

fn family<M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): (&str, &str, Option<&Unit>),
    rows: impl IntoIterator<Item = (Vec<(&'static str, String)>, M)>,
) -> fmt::Result {
    let mut rows = rows.into_iter().peekable();
    let Some((_, first)) = rows.peek() else { return Ok(()) };
    let mut metric = encoder.encode_descriptor(name, help, unit, first.metric_type())?;
    for (labels, value) in rows {
        value.encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

fn counters<V>(rows: Rows<V>) -> impl Iterator<Item = (Vec<(&'static str, String)>, ConstCounter<V>)> {
    rows.into_iter().map(|(labels, value)| (labels, ConstCounter::new(value)))
}

fn one<V>(value: V) -> Rows<V> {
    vec![(Vec::new(), value)]
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let to = &mut encoder;
        let seconds = Some(&Unit::Seconds);
        let bytes = Some(&Unit::Bytes);
        let gauges = |rows: Rows<u64>| {
            rows.into_iter()
                .map(|(labels, value)| (labels, ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))))
        };
        let exits =
            self.by_vcpu(|vcpu| vcpu.exits.iter().map(|e| ("kind", e.kind.clone(), e.count)).collect());
        family(to, ("exits", "Exits of vCPUs by kind", None), counters(exits))?;
        let took = self.by_vcpu(|vcpu| {
            vcpu.exits.iter().map(|e| ("kind", e.kind.clone(), e.total_ns as f64 / SECOND)).collect()
        });
        let help = "Time from exit to answer, of halt: asleep";
        family(to, ("exit", help, seconds), counters(took))?;
        let phases = self.by_vcpu(|vcpu| {
            let time = vcpu.time;
            [
                ("guest", time.guest_ns),
                ("exits", time.exits_ns),
                ("halted", time.halted_ns),
                ("resting", time.resting_ns),
            ]
            .map(|(phase, ns)| ("phase", phase.to_owned(), ns as f64 / SECOND))
            .into()
        });
        family(to, ("vcpu_phase", "What the threads of vCPUs were at", seconds), counters(phases))?;
        let host = |ns: fn(&wardian_machine::TimeSpent) -> u64| -> Rows<f64> {
            let row = |vcpu: &wardian_machine::VcpuStats| {
                (vec![("vcpu", vcpu.vcpu.to_string())], ns(&vcpu.time) as f64 / SECOND)
            };
            self.stats.vcpus.iter().map(row).collect()
        };
        let help = "The host's scheduler ran the thread of the vCPU";
        family(to, ("vcpu_ran", help, seconds), counters(host(|time| time.ran_ns)))?;
        let help = "The thread of the vCPU was runnable and the host did not run it";
        family(to, ("vcpu_steal", help, seconds), counters(host(|time| time.delayed_ns)))?;
        let fates = ["delivered", "replayed", "missed", "masked", "coalesced", "stepped"];
        family(to, ("ticks", "What became of timer ticks", None), counters(self.timers(&fates)))?;
        let help = "Ticks that are still owed to the guest";
        let backlog =
            self.timers(&["backlog"]).into_iter().map(|(labels, n)| (labels[..1].to_vec(), n)).collect();
        family(to, ("ticks_backlog", help, None), gauges(backlog))?;
        let guest = one(self.stats.guest_ns as f64 / SECOND);
        let guest = guest.into_iter().map(|(labels, value)| (labels, ConstGauge::new(value)));
        family(to, ("guest_time", "Guest time since the last reset", seconds), guest)?;
        family(to, ("resets", "Resets", None), counters(one(self.stats.reboots)))?;
        family(to, ("memory_size", "Guest RAM", bytes), gauges(one(self.memory)))?;
        if let Some(resident) = self.resident {
            let help = "Memory of the machine's process that is in the host's RAM";
            family(to, ("memory_resident", help, bytes), gauges(one(resident)))?;
        }
        let all = [
            Status::Starting,
            Status::Running,
            Status::Paused,
            Status::Held,
            Status::Resetting,
            Status::Ended,
        ];
        let row = |status: Status| (vec![("status", word(status))], u64::from(status == self.status));
        family(to, ("status", "1 for what the machine is at", None), gauges(all.map(row).into()))
    }
}

fn word(status: Status) -> String {
    serde_json::to_value(status).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Resident bytes of this process: proc(5), `statm`, second field, in pages.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

pub(crate) async fn metrics(host: &Arc<Host>) -> Result<Reply, Fault> {
    let (control, about) = (host.control.clone(), &host.about);
    let memory = about.memory;
    let scrape =
        move || Scrape { stats: control.stats(), status: control.status(), memory, resident: resident() };
    let scrape = host.beside(scrape).await?;
    let text = text(scrape).map_err(|error| {
        Fault::new(
            hyper::StatusCode::INTERNAL_SERVER_ERROR,
            format!("The counters cannot be written: {error}"),
        )
    })?;
    Ok(plain("application/openmetrics-text; version=1.0.0; charset=utf-8", text))
}

fn text(scrape: Scrape) -> Result<String, fmt::Error> {
    let name = scrape.stats.name.clone();
    let mut registry =
        Registry::with_prefix_and_labels("wardian", [("machine".into(), name.into())].into_iter());
    registry.register_collector(Box::new(scrape));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}
