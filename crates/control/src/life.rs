//! Pausing, going on, stopping, resetting.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use wardian_machine::{OnResume, Status};

use crate::reply::{Fault, Reply, ok};
use crate::router::Asked;
use crate::server::Host;

/// What became of it.
#[derive(Serialize)]
struct Done {
    /// What the machine is at now.
    status: Status,
    /// It was not so before.
    changed: bool,
}

fn done(host: &Host, changed: bool) -> Result<Reply, Fault> {
    ok(&Done { status: host.control.status(), changed })
}

/// The machine must not have ended.
fn lives(host: &Host) -> Result<(), Fault> {
    match host.control.status() {
        Status::Ended => Err(Fault::conflict("The machine has ended")),
        _ => Ok(()),
    }
}

pub(crate) async fn pause(host: &Arc<Host>) -> Result<Reply, Fault> {
    lives(host)?;
    // One at a time: a pause that hangs at a stuck disk takes no more than one thread.
    let turn = Arc::clone(&host.turn).lock_owned().await;
    let control = host.control.clone();
    let changed = host
        .beside(move || {
            let changed = control.park();
            drop(turn);
            changed
        })
        .await?;
    done(host, changed)
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resume {
    /// As `--on-resume`.
    clock: Option<String>,
}

pub(crate) async fn resume(host: &Arc<Host>, asked: &Asked) -> Result<Reply, Fault> {
    let wish: Resume = asked.json()?;
    let clock = wish.clock.map(|text| text.parse::<OnResume>()).transpose();
    let policy = clock.map_err(|error| Fault::bad(format!("Field clock: {error}")))?.map(|clock| clock.0);
    lives(host)?;
    let turn = Arc::clone(&host.turn).lock_owned().await;
    let control = host.control.clone();
    let changed = host
        .beside(move || {
            let changed = control.unpark(policy);
            drop(turn);
            changed
        })
        .await?;
    done(host, changed)
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum How {
    /// The power button.
    #[default]
    Button,
    /// At once.
    Now,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stop {
    #[serde(default)]
    how: How,
}

pub(crate) fn stop(host: &Host, asked: &Asked) -> Result<Reply, Fault> {
    let wish: Stop = asked.json()?;
    lives(host)?;
    let changed = match wish.how {
        How::Button => host.control.press_power_button(),
        How::Now => {
            host.control.end();
            true
        }
    };
    if !changed {
        return Err(Fault::conflict("The machine has no power button now: it starts or resets"));
    }
    done(host, changed)
}

pub(crate) fn reset(host: &Host) -> Result<Reply, Fault> {
    lives(host)?;
    host.control.reset();
    done(host, true)
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nmi {
    /// All if not given.
    vcpu: Option<usize>,
}

pub(crate) fn nmi(host: &Host, asked: &Asked) -> Result<Reply, Fault> {
    let wish: Nmi = asked.json()?;
    lives(host)?;
    let cpus = host.control.cpus();
    let which = match wish.vcpu {
        Some(vcpu) if vcpu >= cpus => {
            return Err(Fault::bad(format!("There is no vCPU {vcpu}: there are {cpus}, from 0")));
        }
        Some(vcpu) => vcpu..vcpu + 1,
        None => 0..cpus,
    };
    let wanted = which.len();
    if which.filter(|vcpu| host.control.nmi(*vcpu)).count() < wanted {
        return Err(Fault::conflict("The machine has no interrupts now: it starts or resets"));
    }
    done(host, true)
}
