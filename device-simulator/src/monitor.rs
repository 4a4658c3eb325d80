//! Simulated sensors: each measures the surroundings it simulates, reports them, and acts when it is told to.

use crate::fleet::StartError;
use crate::{DeviceSpec, Endpoint, now_milliseconds};
use mqtt_connection::{Connection, ConnectionSettings, Delivery, Trust, install_crypto_provider};
use protocol::telemetry::{Reading, ReadingIdentity, Remediation, remediations_topic};
use protocol::{Building, SensorId};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::select;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

/// How many sensors shake hands at the same time.
const HANDSHAKES: usize = 64;
/// So many readings make up a radian of the waves in the surroundings.
const READINGS_OF_A_RADIAN: f64 = 40.0;

/// How sensors and their surroundings behave.
#[derive(Debug, Clone)]
pub struct SensorOptions {
    /// The broker.
    pub endpoint: Endpoint,
    /// PEM file of the authority behind the broker's certificate; none for the system's authorities.
    pub ca: Option<PathBuf>,
    /// Where the sensors are.
    pub building: Building,
    /// How high the waves of temperature and humidity are, in degrees Celsius and percent.
    pub velocity: f64,
    /// How long after a reading comes the next.
    pub update_frequency: Duration,
    /// How much a remediation changes, in degrees Celsius and percent.
    pub remediation_factor: f64,
    /// What the waves of temperature rise from, in degrees Celsius.
    pub min_temperature: f64,
    /// What the waves of humidity rise from, in percent.
    pub min_humidity: f64,
    /// How many readings each sensor sends; none for ever.
    pub readings: Option<u32>,
    /// Whether readings have neither id nor time, as those of older sensors.
    pub plain: bool,
}

/// What has happened at a sensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum SensorEvent {
    /// It has measured, and the broker has the reading.
    Measured {
        /// The sensor.
        device: SensorId,
        /// In Unix milliseconds.
        time: i64,
        /// In degrees Celsius.
        temperature: f64,
        /// In percent.
        humidity: f64,
    },
    /// It was told to act, and has.
    Remediated {
        /// The sensor.
        device: SensorId,
        /// In Unix milliseconds.
        time: i64,
        /// The temperature that it was told, in degrees Celsius.
        target: f64,
        /// How much it has changed the temperature by; below zero it cools.
        change: f64,
    },
}

/// What a sensor measures: waves over a base, and what remediations have added.
#[derive(Debug, Clone)]
struct Surroundings {
    velocity: f64,
    factor: f64,
    temperature: f64,
    humidity: f64,
    readings: u32,
    /// The last measurement.
    last: Option<(f64, f64)>,
}

impl Surroundings {
    fn new(options: &SensorOptions) -> Self {
        Self {
            velocity: options.velocity,
            factor: options.remediation_factor,
            temperature: options.min_temperature,
            humidity: options.min_humidity,
            readings: 0,
            last: None,
        }
    }

    /// Temperature and humidity now, to a tenth; time goes on by one reading.
    fn measure(&mut self) -> (f64, f64) {
        let wave = self.velocity * (f64::from(self.readings) / READINGS_OF_A_RADIAN).sin();
        self.readings += 1;
        let tenth = |value: f64| (value * 10.0).round() / 10.0;
        let measured = (tenth(self.temperature + wave), tenth((self.humidity + wave).clamp(0.0, 100.0)));
        self.last = Some(measured);
        measured
    }

    /// Acts on what the sensor was told; returns the change of temperature, if it has measured anything yet.
    fn remediate(&mut self, remediation: &Remediation) -> Option<f64> {
        let (temperature, humidity) = self.last?;
        let toward = |target: f64, last: f64| if target < last { -self.factor } else { self.factor };
        let change = toward(remediation.temperature, temperature);
        self.humidity += toward(remediation.humidity, humidity);
        self.temperature += change;
        Some(change)
    }
}

/// Sensors that run until they have sent all their readings, or are dropped.
pub struct Sensors {
    tasks: JoinSet<()>,
    connected: watch::Receiver<bool>,
    last_failure: Arc<Mutex<Option<String>>>,
}

impl Sensors {
    /// Starts a sensor for each thing, which reports under its own name or the given one. What happens comes out of the
    /// receiver.
    pub fn start(
        options: &SensorOptions,
        things: Vec<(DeviceSpec, SensorId)>,
    ) -> Result<(Self, mpsc::UnboundedReceiver<SensorEvent>), StartError> {
        install_crypto_provider();
        let trust = Trust::new(options.ca.as_deref()).map_err(StartError::new)?;
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        let (set_connected, connected) = watch::channel(false);
        let last_failure = Arc::<Mutex<Option<String>>>::default();
        let (events, receiver) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        for (spec, device) in things {
            let failure = Arc::clone(&last_failure);
            let [certificate, key] = ["certificate.pem", "private.key"].map(|name| spec.certificates.join(name));
            let settings = ConnectionSettings {
                client_id: spec.thing.to_string(),
                endpoint: options.endpoint.clone(),
                tls: trust.of_client(&certificate, &key, options.endpoint.port).map_err(StartError::new)?,
                clean_session: true,
                filters: vec![remediations_topic(&options.building)],
                handshakes: Arc::clone(&handshakes),
                on_failure: Box::new(move |why| *lock(&failure) = Some(why.to_owned())),
            };
            let sensor = Sensor {
                device,
                surroundings: Surroundings::new(options),
                options: options.clone(),
                run: format!("{:016x}", rand::random::<u64>()),
                events: events.clone(),
            };
            tasks.spawn(sensor.run(Arc::new(settings), set_connected.clone()));
        }
        Ok((Self { tasks, connected, last_failure }, receiver))
    }

    /// Returns once a sensor is connected; fails with the last reason if none is by then.
    pub async fn connected(&self, patience: Duration) -> Result<(), StartError> {
        let mut connected = self.connected.clone();
        let result = tokio::time::timeout(patience, connected.wait_for(|connected| *connected)).await;
        if matches!(result, Ok(Ok(_))) {
            return Ok(());
        }
        let why = lock(&self.last_failure).clone().unwrap_or_else(|| "the broker does not answer".to_owned());
        Err(StartError::new(format!("no sensor could connect within {patience:?}; the last failure: {why}")))
    }

    /// Returns when all readings are sent.
    pub async fn finished(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

fn lock(failure: &Mutex<Option<String>>) -> MutexGuard<'_, Option<String>> {
    failure.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A sensor.
struct Sensor {
    device: SensorId,
    surroundings: Surroundings,
    options: SensorOptions,
    /// Its readings' ids begin with this, another one at each start.
    run: String,
    events: mpsc::UnboundedSender<SensorEvent>,
}

impl Sensor {
    async fn run(mut self, settings: Arc<ConnectionSettings>, connected: watch::Sender<bool>) {
        let (connection, mut inbox) = Connection::open(settings);
        // An error means that the connection is being dropped, and this with it.
        let _ = connection.online().wait_for(|online| *online).await;
        connected.send_replace(true);
        let mut due = interval_at(Instant::now(), self.options.update_frequency);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut left = self.options.readings.unwrap_or(u32::MAX);
        while left > 0 {
            select! {
                _ = due.tick() => {
                    self.report(&connection).await;
                    if self.options.readings.is_some() {
                        left -= 1;
                    }
                }
                Some(delivery) = inbox.recv() => self.receive(delivery),
            }
        }
    }

    async fn report(&mut self, connection: &Connection) {
        let (temperature, humidity) = self.surroundings.measure();
        let (device, time) = (self.device.clone(), now_milliseconds());
        // It is made of digits and letters, and short.
        let id = format!("{}-{}", self.run, self.surroundings.readings).parse().ok();
        let identity = id.filter(|_| !self.options.plain).map(|id| ReadingIdentity { id, time });
        let reading = Reading { device: device.clone(), temperature, humidity, identity };
        connection.publish(reading.encode(&self.options.building)).await;
        self.tell(SensorEvent::Measured { device, time, temperature, humidity });
    }

    fn receive(&mut self, delivery: Delivery) {
        match Remediation::decode(delivery.payload()) {
            // All sensors of a building hear each other's.
            Ok(remediation) if remediation.device == self.device => {
                if let Some(change) = self.surroundings.remediate(&remediation) {
                    let (device, time, target) = (self.device.clone(), now_milliseconds(), remediation.temperature);
                    self.tell(SensorEvent::Remediated { device, time, target, change });
                }
            }
            Ok(_) => {}
            Err(error) => tracing::warn!("{}: {error}", self.device),
        }
        delivery.acknowledge();
    }

    fn tell(&self, event: SensorEvent) {
        // Nobody may listen any more.
        let _ = self.events.send(event);
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "values are whole tenths")]
mod tests {
    use super::*;

    fn surroundings(velocity: f64, factor: f64) -> Surroundings {
        let options = SensorOptions {
            endpoint: "localhost".parse().unwrap(),
            ca: None,
            building: "1".parse().unwrap(),
            velocity,
            update_frequency: Duration::from_secs(1),
            remediation_factor: factor,
            min_temperature: 20.0,
            min_humidity: 95.0,
            readings: None,
            plain: false,
        };
        Surroundings::new(&options)
    }

    fn told(temperature: f64) -> Remediation {
        Remediation { device: "a".parse().unwrap(), temperature, humidity: 50.0 }
    }

    #[test]
    fn values_rise_and_fall_in_waves() {
        let mut calm = surroundings(10.0, 1.0);
        let measured: Vec<_> = (0..=126).map(|_| calm.measure()).collect();
        assert_eq!(measured[0], (20.0, 95.0));
        // A quarter of a wave is π/2 × 40 readings.
        assert_eq!(measured[63], (30.0, 100.0));
        assert!((measured[126].0 - 20.0).abs() < 0.2);
    }

    #[test]
    fn a_sensor_cools_if_it_is_told_a_lower_temperature_than_its_last_and_else_warms() {
        let mut calm = surroundings(0.0, 1.5);
        assert_eq!(calm.remediate(&told(10.0)), None, "nothing is known yet");
        calm.measure();
        assert_eq!(calm.remediate(&told(19.9)), Some(-1.5));
        assert_eq!(calm.measure(), (18.5, 93.5));
        assert_eq!(calm.remediate(&told(18.5)), Some(1.5));
        assert_eq!(calm.measure().0, 20.0);
    }
}
