//! The only reader of environment variables. `template.yaml` sets them.

/// The variable's value. Fails with a sentence that names it: the function's template is wrong then.
pub fn required(name: &str) -> Result<String, String> {
    match std::env::var(name) {
        Ok(value) if !value.is_empty() => Ok(value),
        _ => Err(format!("the environment variable {name} is not set: see the function in template.yaml")),
    }
}

/// The variable's value; none if it is not set, or empty.
pub fn optional(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The variable's value as a finite number, which may have a fraction.
pub fn decimal(name: &str) -> Result<f64, String> {
    let value = required(name)?;
    let number = value.parse().ok().filter(|number: &f64| number.is_finite());
    number.ok_or_else(|| format!("the environment variable {name} is {value:?}: expected a number"))
}

/// The variable's value as a whole number.
pub fn number(name: &str) -> Result<u32, String> {
    let value = required(name)?;
    value.parse().map_err(|_| format!("the environment variable {name} is {value:?}: expected a number"))
}

/// Whether the stack handles what topics do not tell apart, or leaves it to another one: the template's `DeviceTopics`.
pub fn owns_device_topics() -> Result<bool, String> {
    match required("DEVICE_TOPICS")?.as_str() {
        "own" => Ok(true),
        "shared" => Ok(false),
        other => Err(format!("the environment variable DEVICE_TOPICS is {other:?}: expected own or shared")),
    }
}
