//! What the machine is and how it does.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use hyper::StatusCode;
use serde::Serialize;
use wardian_cpu::CpuState;
use wardian_machine::{About, Control, Status};
use wardian_memory::Gpa;

use crate::reply::{Fault, Reply, ok, plain};
use crate::router::Asked;
use crate::server::Host;

fn not_now() -> Fault {
    Fault::conflict("The machine does not run now: it starts, resets or has ended")
}

#[derive(Serialize)]
struct Info<'a> {
    #[serde(flatten)]
    about: &'a About,
    pid: u32,
    version: &'static str,
    engine: &'a str,
    status: Status,
    /// By the host's wall clock.
    started_unix_ns: u64,
    socket: PathBuf,
}

pub(crate) fn info(host: &Host) -> Result<Reply, Fault> {
    ok(&Info {
        about: &host.about,
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION"),
        engine: &host.engine,
        status: host.control.status(),
        started_unix_ns: host.started,
        socket: host.socket.clone(),
    })
}

pub(crate) async fn stats(host: &Arc<Host>) -> Result<Reply, Fault> {
    let control = host.control.clone();
    ok(&host.beside(move || control.stats()).await?)
}

pub(crate) async fn inspect(host: &Arc<Host>, asked: Asked) -> Result<Reply, Fault> {
    let control = host.control.clone();
    let tree = host.beside(move || control.inspect()).await?.ok_or_else(not_now)?;
    let found = tree.get(&asked.arg).ok_or_else(|| {
        Fault::new(StatusCode::NOT_FOUND, format!("There is nothing at '{}' to look at", asked.arg))
    })?;
    ok(found)
}

/// A vCPU and its registers.
#[derive(Serialize)]
struct VcpuView {
    index: usize,
    phase: &'static str,
    last_exit: Option<&'static str>,
    state: CpuState,
}

fn view(control: &Control, index: usize) -> Result<VcpuView, Fault> {
    let (phase, last_exit) = control.doing(index).ok_or_else(not_now)?;
    let state = control.look(index, |vcpu| vcpu.state()).ok_or_else(|| {
        Fault::new(StatusCode::GATEWAY_TIMEOUT, format!("vCPU {index} does not answer, or is being reset"))
    })?;
    Ok(VcpuView { index, phase, last_exit, state })
}

pub(crate) async fn vcpus(host: &Arc<Host>) -> Result<Reply, Fault> {
    let control = host.control.clone();
    let all = move || (0..control.cpus()).map(|index| view(&control, index)).collect::<Result<Vec<_>, _>>();
    ok(&host.beside(all).await??)
}

pub(crate) async fn vcpu(host: &Arc<Host>, asked: Asked) -> Result<Reply, Fault> {
    let control = host.control.clone();
    let cpus = control.cpus();
    let index = asked.arg.parse().ok().filter(|index| *index < cpus).ok_or_else(|| {
        Fault::new(StatusCode::NOT_FOUND, format!("There is no vCPU {}: there are {cpus}, from 0", asked.arg))
    })?;
    ok(&host.beside(move || view(&control, index)).await??)
}

/// Where guest RAM can be read: open `/proc/PID/fd/FD` for reading.
#[derive(Serialize)]
struct Memory {
    pid: u32,
    fd: i32,
    size: u64,
    /// The file is only what RAM was at first: read by `/memory/{gpa}`.
    private: bool,
    /// The descriptor is another one after each reset.
    reboots: u64,
    regions: Vec<Region>,
}

#[derive(Serialize)]
struct Region {
    gpa: u64,
    size: u64,
    /// In the file.
    offset: u64,
}

pub(crate) fn memory(host: &Host) -> Result<Reply, Fault> {
    let memory = host.control.memory().ok_or_else(not_now)?;
    let mut offset = 0;
    let regions = memory.ranges().into_iter().map(|range| {
        let region = Region { gpa: range.start, size: range.end - range.start, offset };
        offset += region.size;
        region
    });
    ok(&Memory {
        pid: std::process::id(),
        fd: memory.file().as_raw_fd(),
        size: memory.size(),
        private: memory.is_private(),
        reboots: host.control.stats().reboots,
        regions: regions.collect(),
    })
}

/// Bytes of one answer at most, and if no size is given.
const MOST_BYTES: usize = 1 << 20;
const SOME_BYTES: usize = 4096;

pub(crate) async fn memory_at(host: &Arc<Host>, asked: Asked) -> Result<Reply, Fault> {
    let arg = &asked.arg;
    let parsed =
        arg.strip_prefix("0x").map_or_else(|| arg.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok());
    let gpa = parsed
        .ok_or_else(|| Fault::bad(format!("'{arg}' is no address: give a number, or 0x and hexadecimal")))?;
    let size = asked.param("size", "a number of bytes")?.unwrap_or(SOME_BYTES);
    if size > MOST_BYTES {
        return Err(Fault::bad(format!("Parameter size is {size}: at most {MOST_BYTES} bytes are possible")));
    }
    let memory = host.control.memory().ok_or_else(not_now)?;
    // RAM that is read from an image as it is needed may take its time.
    let read = move || {
        let mut bytes = vec![0; size];
        memory.read(Gpa(gpa), &mut bytes).map(|()| bytes)
    };
    let bytes =
        host.beside(read).await?.map_err(|error| Fault::new(StatusCode::NOT_FOUND, error.to_string()))?;
    Ok(plain("application/octet-stream", bytes))
}
