// Runs before the first paint, so that a chosen theme does not flash.
{
  const { theme } = JSON.parse(localStorage.getItem("jaxlm.page") || "{}");
  if (theme) document.documentElement.dataset.theme = theme;
}
