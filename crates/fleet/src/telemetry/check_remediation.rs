//! Looks whether a remediation has had an effect: a sensor that has fallen silent shows none.

use super::remedies::{Adapters, Check, LONGEST_DELAY, settle};
use crate::{Error, queue};

/// Reads a check that is due; people are told if nothing has shown the effect. `now` is in Unix milliseconds.
pub async fn handle(adapters: &Adapters, body: &str, now: i64) -> Result<(), Error> {
    let Check { device, remedy } = queue::json("check", body.as_bytes())?;
    let name = device.as_str();
    let (climate, ()) = adapters.climates.change(name, |climate| climate.check(&remedy, now)).await?;
    settle(adapters, name, climate.pending(), now).await?;
    // The sensor may never say anything again.
    if climate.is_untold() { adapters.ask_for_check(&Check { device, remedy }, LONGEST_DELAY).await } else { Ok(()) }
}
