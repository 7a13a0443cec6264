import { render } from "preact";
import "./style.css";

render(<p>evsys-bus</p>, document.body);
